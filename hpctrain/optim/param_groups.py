"""Which parameters weight decay touches, decided by the type of their module, never by its name."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def parameter_groups(model: nn.Module, *, weight_decay: float, decay_norm_and_bias: bool) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: each trainable parameter of ``model`` once, in the model's order.

    Parameters of normalisation layers and biases get no weight decay (Goyal et al. 2017, section 5.1) unless
    ``decay_norm_and_bias``; a tied parameter gets none if any of its owners asks for that.
    """
    exempt: set[int] = set()
    if not decay_norm_and_bias:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, _NORMS) or name.endswith("bias"):
                    exempt.add(id(parameter))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if id(p) not in exempt], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
