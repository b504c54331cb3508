"""Whether loops that are compared do the same work: from equal weights and batches they must get to equal weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from hpctrain.bench.blocks import settle
from hpctrain.bench.variants import Variant
from hpctrain.comm.base import Communicator
from hpctrain.errors import MachineError
from hpctrain.gradients.replicas import check_replicas

VERIFIED_STEPS = 3
#: Largest difference between two loops, as a share of the way that the weights have moved. Sums in another order
#: differ by 1e-7 a number; what is small in narrow formats is rounded a thousand times as coarsely.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}


@torch.no_grad()
def snapshot(model: nn.Module) -> Tensor:
    """All parameters as one vector [n] on their device."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


def difference(reference: Tensor, other: Tensor, start: Tensor) -> float:
    """Norm of what separates ``other`` from ``reference``, over the norm of the way from ``start`` [n]."""
    return float((other - reference).norm() / (reference - start).norm())


def verify(
    variants: Sequence[Variant], comm: Communicator, precision: str, before_step: Callable[[int], None]
) -> dict[str, float]:
    """Take the first steps with every variant; returns how far each that exchanges ended from the first one.

    ``before_step`` makes a loop's randomness that of the run at this step. Collective. Raises MachineError when a
    variant went elsewhere, or its ranks did.
    """
    start, reference = snapshot(variants[0].model), None
    differences: dict[str, float] = {}
    for variant in variants:
        with variant.turn():
            for step in range(VERIFIED_STEPS):
                before_step(step)
                variant.step()
            settle(comm)
        if not variant.exchanges:
            continue
        check_replicas(comm, variant.model.named_parameters())
        reached = snapshot(variant.model)
        if reference is None:
            reference = reached
            continue
        differences[variant.name] = difference(reference, reached, start)
        # Written so that NaN fails too.
        if not differences[variant.name] <= TOLERANCE[precision]:
            raise MachineError(
                f"after {VERIFIED_STEPS} steps {variant.name} is {differences[variant.name]:.2g} of the way away from "
                f"{variants[0].name}, more than {TOLERANCE[precision]:g}: they do not compute the same"
            )
    return differences
