"""The factor that moves gradients into the range of a narrow type: one power of two a bucket, exact to undo.

Divided first, small gradients vanish; summed first, large ones overflow; a fixed split of the two helps neither a
bucket of tiny gradients nor one of large ones. So the factor follows the magnitude that the bucket's mean had in
the step before, which is the same on every rank. Only arithmetic here: who measures and agrees is the exchange.
"""

from __future__ import annotations

import math

import torch

#: How much the sum may grow from one step to the next before it leaves the range.
HEADROOM = 16.0
#: Factors beyond these bounds could not be undone in float32.
_LARGEST_EXPONENT = 100


def wire_scale(dtype: torch.dtype, sum_magnitude: float) -> float:
    """The largest power of two that leaves a sum as large as ``sum_magnitude`` its headroom in ``dtype``.

    1.0 for types with float32's range, and where nothing is known: of a magnitude that is 0 or not finite.
    """
    limit = torch.finfo(dtype).max
    if limit > torch.finfo(torch.float16).max or not 0 < sum_magnitude < math.inf:
        return 1.0
    exponent = math.floor(math.log2(limit / HEADROOM) - math.log2(sum_magnitude))
    return math.ldexp(1.0, max(-_LARGEST_EXPONENT, min(_LARGEST_EXPONENT, exponent)))
