"""The contract of the gradient kernels: narrow, count, widen and sum flat buffers, each in one pass over memory.

A kernel knows nothing of ranks, parameters or steps. There is one set for host memory and one for GPUs, with the
same results (``hpctrain.kernels.registry``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of gradients and its place in the wire: ``values`` [m] float32, contiguous, at ``wire[start:]``."""

    values: Tensor
    start: int


class Kernels(Protocol):
    """``wire`` is float16, bfloat16 or float32 [n]; rounding is to nearest, ties to even."""

    def narrow(self, pieces: Sequence[Piece], wire: Tensor, scale: float) -> None:
        """``wire[start + i] = values[i] * scale`` for each piece, beyond the range inf; the rest stays."""

    def narrow_with_feedback(self, pieces: Sequence[Piece], residual: Tensor, wire: Tensor, scale: float) -> None:
        """The same for ``values + residual``; ``residual`` [n] float32 keeps what rounding took away.

        Where the wire is not finite the residual becomes 0.
        """

    def count(self, pieces: Sequence[Piece], wire: Tensor, scale: float) -> Tensor:
        """int64 [4] on the device, of what ``narrow`` just did: overflow, underflow, subnormal, nonfinite.

        Finite values that became inf, values other than 0 that became 0, those below the wire's smallest normal
        number, and values that were not finite before.
        """

    def widen(
        self, parts: Sequence[Tensor], out: Tensor, scale: float, share: slice | None = None, *, norm: bool = True
    ) -> Tensor:
        """``out`` [n] float32 = the concatenation of ``parts`` (of the wire's dtype), times ``scale``.

        Returns its figures as ``measure`` does. Where a ``share`` is given the magnitude may be that of ``out[share]``
        alone: if all ranks look at all of it, each does the work of all.
        """

    def measure(self, tensors: Sequence[Tensor], *, norm: bool) -> Tensor:
        """float64 [2] on the device: the largest magnitude in ``tensors``, inf where anything is inf or NaN, and the
        sum of squares. Without ``norm`` the latter is any number.
        """

    def sum_rows(self, rows: Sequence[Tensor], out: Tensor) -> None:
        """``out`` [m] = the sum of ``rows`` [m] each, added in float32 as a pairwise tree and rounded once.

        The tree is ((0 + 1) + (2 + 3)) + …, a row without a partner waits for the next level. ``out`` may be one
        of the rows.
        """
