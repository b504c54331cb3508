"""The kernels in numpy, element by element as the contract words them: what the fast ones are tested against.

Slow and allocating freely; nothing in training uses it. Numbers of a wire are held as float64, which is exact for
every wire type.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Format:
    """A binary floating-point format (IEEE 754, section 3.3): ``digits`` of the significand with the hidden one."""

    digits: int
    smallest_exponent: int
    largest_exponent: int

    @property
    def smallest_normal(self) -> float:
        return 2.0**self.smallest_exponent

    def unit(self, values: Float64) -> Float64:
        """The unit in the last place at ``values``, of any sign."""
        exponents = np.frexp(values)[1] - 1
        unit: Float64 = np.ldexp(1.0, np.maximum(exponents, self.smallest_exponent) - self.digits + 1)
        return unit


FORMATS = {
    torch.float16: Format(11, -14, 15),
    torch.bfloat16: Format(8, -126, 127),
    torch.float32: Format(24, -126, 127),
}


def rounded(values: Float64, dtype: torch.dtype) -> Float64:
    """``values`` to the nearest number of ``dtype``, ties to even, beyond its range inf."""
    target = FORMATS[dtype]
    with np.errstate(invalid="ignore", over="ignore"):
        unit = target.unit(np.where(np.isfinite(values), values, 0.0))
        nearest = np.rint(values / unit) * unit
        return np.where(np.abs(nearest) >= 2.0 ** (target.largest_exponent + 1), np.copysign(np.inf, values), nearest)


def narrow(values: Float32, dtype: torch.dtype, scale: float) -> Float64:
    """What ``Kernels.narrow`` writes for one piece: the product is taken in float32, then rounded."""
    with np.errstate(over="ignore", invalid="ignore"):
        return rounded((values * np.float32(scale)).astype(np.float64), dtype)


def narrow_with_feedback(
    values: Float32, residual: Float32, dtype: torch.dtype, scale: float
) -> tuple[Float64, Float32]:
    """(wire, new residual) of one piece; what the wire says is subtracted in float32, 0 where that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        compensated = values + residual
        wire = narrow(compensated, dtype, scale)
        left = compensated - (wire / scale).astype(np.float32)
    return wire, np.where(np.isfinite(left), left, np.float32(0.0))


def count(values: Float32, wire: Float64, dtype: torch.dtype) -> NDArray[np.int64]:
    """Overflow, underflow, subnormal and nonfinite elements of one piece."""
    magnitude = np.abs(wire)
    return np.array(
        [
            (np.isfinite(values) & ~np.isfinite(wire)).sum(),
            ((values != 0) & (wire == 0)).sum(),
            ((magnitude > 0) & (magnitude < FORMATS[dtype].smallest_normal)).sum(),
            (~np.isfinite(values)).sum(),
        ],
        dtype=np.int64,
    )


def widen(parts: Sequence[Float64], scale: float) -> tuple[Float32, float, float]:
    """(out, largest magnitude, sum of squares)."""
    with np.errstate(over="ignore", invalid="ignore"):
        out = np.concatenate([part.astype(np.float32) for part in parts]) * np.float32(scale)
        return out, largest(out), float(np.square(out.astype(np.float64)).sum())


def largest(values: Float32) -> float:
    """The largest magnitude, inf where anything is inf or NaN."""
    return float(np.abs(values).max(initial=0.0)) if np.isfinite(values).all() else float("inf")


def sum_rows(rows: Sequence[Float64], dtype: torch.dtype) -> Float64:
    """The pairwise tree of the contract, level by level in float32."""
    level = [row.astype(np.float32) for row in rows]
    with np.errstate(over="ignore", invalid="ignore"):
        while len(level) > 1:
            pairs = [first + second for first, second in zip(level[::2], level[1::2], strict=False)]
            level = pairs + level[2 * len(pairs) :]
    return rounded(level[0].astype(np.float64), dtype)
