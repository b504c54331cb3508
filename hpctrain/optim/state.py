"""An optimizer's state as tensors by name, for checkpoints that hold no pickled objects.

A key is ``slot/parameter``, such as ``momentum_buffer/layer1.0.conv1.weight``: it depends on the model's names,
not on the order or grouping of parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.errors import UserError
from hpctrain.topology.voice import listed


def optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The live tensors of ``optimizer``'s state, zeros where a parameter has not been stepped yet."""
    tensors = {}
    for name, parameter, slots in _expected(optimizer, model):
        held = optimizer.state.get(parameter, {})
        for slot in slots:
            tensor = held.get(slot)
            tensors[f"{slot}/{name}"] = _blank(optimizer, slot, parameter) if tensor is None else tensor
    return tensors


def load_optimizer_state(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what ``optimizer_state`` gave into ``optimizer``, in each parameter's memory format and device.

    Raises UserError, naming keys, when the tensors belong to another model or optimizer; nothing is changed then.
    """
    expected = list(_expected(optimizer, model))
    shapes = {f"{slot}/{name}": _shape(slot, p) for name, p, slots in expected for slot in slots}
    faults = [
        *_listed("missing", [key for key in shapes if key not in tensors]),
        *_listed("unknown", [key for key in tensors if key not in shapes]),
        *_listed("of another shape", [k for k, shape in shapes.items() if k in tensors and tensors[k].shape != shape]),
    ]
    if faults:
        raise UserError(
            f"The checkpoint's optimizer state does not fit {type(optimizer).__name__} on this model "
            f"({'; '.join(faults)}): resume with the model and optimizer it was saved with."
        )
    for name, parameter, slots in expected:
        optimizer.state[parameter] = {
            slot: _blank(optimizer, slot, parameter).copy_(tensors[f"{slot}/{name}"]) for slot in slots
        }


def _expected(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Iterator[tuple[str, nn.Parameter, tuple[str, ...]]]:
    """Name, parameter and slots of everything that ``optimizer`` moves."""
    settings = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if id(parameter) in settings:
            yield name, parameter, _slots(optimizer, settings[id(parameter)])


def _slots(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> tuple[str, ...]:
    if isinstance(optimizer, torch.optim.Adam):
        return ("step", "exp_avg", "exp_avg_sq")
    momentum = ("momentum_buffer",) if group["momentum"] else ()
    if isinstance(optimizer, torch.optim.SGD):
        return momentum
    assert isinstance(optimizer, torch.optim.RMSprop), type(optimizer)
    return ("step", "square_avg", *momentum)


def _shape(slot: str, parameter: nn.Parameter) -> torch.Size:
    return torch.Size() if slot == "step" else parameter.shape


def _blank(optimizer: torch.optim.Optimizer, slot: str, parameter: nn.Parameter) -> Tensor:
    """The slot as it is before the first step: zeros. Only fused optimizers keep ``step`` on the device."""
    if slot == "step":
        return torch.zeros((), device=parameter.device if optimizer.defaults.get("fused") else "cpu")
    return torch.zeros_like(parameter, requires_grad=False)


def _listed(what: str, keys: list[str]) -> Iterator[str]:
    if keys:
        yield f"{what}: {listed(keys, 1)}"
