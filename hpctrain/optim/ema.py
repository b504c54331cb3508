"""Exponential moving average of a model's parameters, for evaluation; training never sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hpctrain.errors import UserError


class Ema:
    """Shadow of every parameter: ``shadow = decay * shadow + (1 - decay) * parameter`` at each ``update``.

    It starts as a copy of ``model``. Buffers (running statistics of batch norm) are averages already and stay the
    model's own.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the parameters as they are after an optimizer step."""
        torch._foreach_lerp_(list(self._shadow.values()), list(model.parameters()), 1.0 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block ``model`` computes with the average; its own parameters come back after it.

        Values are exchanged in place, so views of parameters (flat buffers, graphs) stay valid; the averages are
        with the model then, and ``state_dict`` and ``update`` must wait for the end of the block.
        """
        self._exchange(model)
        try:
            yield
        finally:
            self._exchange(model)

    def state_dict(self) -> dict[str, Tensor]:
        """The live shadow tensors by parameter name."""
        return dict(self._shadow)

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy in what ``state_dict`` gave; raises UserError when it belongs to another model."""
        wrong = [
            name
            for name in {**self._shadow, **tensors}
            if name not in tensors or name not in self._shadow or tensors[name].shape != self._shadow[name].shape
        ]
        if wrong:
            raise UserError(
                f"The checkpoint's moving average does not fit this model, {wrong[0]} to begin with: "
                "resume with the model it was saved with."
            )
        for name, shadow in self._shadow.items():
            shadow.copy_(tensors[name])

    @torch.no_grad()
    def _exchange(self, model: nn.Module) -> None:
        for shadow, parameter in zip(self._shadow.values(), model.parameters(), strict=True):
            own = parameter.clone()
            parameter.copy_(shadow)
            shadow.copy_(own)
