"""Which kernels run on which device; importing it loads none of them."""

from __future__ import annotations

import torch

from hpctrain.errors import UserError
from hpctrain.kernels.base import Kernels


def kernels_for(device: torch.device) -> Kernels:
    """New kernels for tensors on ``device``, with scratch of their own: one set for each thread.

    Raises UserError where a GPU's kernels cannot be loaded.
    """
    if device.type == "cpu":
        from hpctrain.kernels.host import HostKernels

        return HostKernels()
    try:
        from hpctrain.kernels.device import DeviceKernels
    except ImportError as error:
        raise UserError(
            f"gradients on {device} need Triton ({error}): install triton in the version that torch's metadata names"
        ) from error
    return DeviceKernels()
