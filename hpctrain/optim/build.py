"""The optimizer that the configuration names, over a model's parameter groups."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.config.schema import OptimizerConfig
from hpctrain.optim.param_groups import parameter_groups

_Groups = list[dict[str, Any]]


def build_optimizer(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """One of torch's optimizers for ``model``, which is on its device already.

    The learning rate is 0 until the caller sets ``lr`` of each group before a step. With SGD it stands outside
    the momentum buffer, ``v = momentum * v + g; w = w - lr * v``, so a new rate needs no correction (Goyal et al.
    2017, section 3, equation 9).
    """
    groups = parameter_groups(model, weight_decay=config.weight_decay, decay_norm_and_bias=config.decay_norm_and_bias)
    return _BUILDERS[config.name](groups, config)


def _sgd(groups: _Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return _guarded(torch.optim.SGD(groups, lr=0.0, momentum=config.momentum, nesterov=config.nesterov, fused=True))


def _adam(groups: _Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return _guarded(torch.optim.Adam(groups, lr=0.0, betas=(config.momentum, 0.999), fused=True))


def _rmsprop(groups: _Groups, config: OptimizerConfig) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=0.0, momentum=config.momentum, foreach=True)


_BUILDERS: dict[str, Callable[[_Groups, OptimizerConfig], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "rmsprop": _rmsprop,
}


def _guarded(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Check memory formats at the first step of a fused optimizer.

    Torch's fused kernels walk parameter, gradient and state as flat memory and do not look at strides: a
    channels_last parameter with a contiguous gradient (a view of a bucket, say) would be trained on wrong numbers.
    """
    checked = False

    def check(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        nonlocal checked
        if checked:
            return
        checked = True
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                assert gradient is None or _order(gradient) == _order(parameter), (
                    f"a gradient of shape {tuple(gradient.shape)} has strides {gradient.stride()}, "
                    f"but its parameter has {parameter.stride()}"
                )

    optimizer.register_step_pre_hook(check)
    return optimizer


def _order(tensor: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element; the others place nothing."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]
