"""The gradient kernels for host memory: torch's vectorised operations on chunks that stay in a core's cache.

What costs time on a CPU is the passes over memory: each kernel reads its input once and writes its output once,
and all that happens in between happens to one chunk at a time, in scratch that is allocated once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpctrain.kernels.base import Piece

#: Elements a thread works on at a time. With the scratch, 8 bytes an element, and the wire that makes 1 MiB, the
#: second-level cache of a core of today's servers; much less costs time in calls, more in misses.
CHUNK = 96 << 10
#: Below it, squares in float32 may have vanished that count; from it on, all that vanish are beyond its digits.
_SQUARES_TRUSTED = 2.0**-80
#: Whole numbers up to here are exact in float32.
_COUNTABLE = 1 << 24


@dataclass(frozen=True, slots=True)
class _Bits:
    """A wire's elements as integers: without the sign, bit patterns are ordered as the magnitudes are."""

    integer: torch.dtype
    magnitude: int
    infinity: int


_BITS = {
    torch.float16: _Bits(torch.int16, 0x7FFF, 0x7C00),
    torch.bfloat16: _Bits(torch.int16, 0x7FFF, 0x7F80),
    torch.float32: _Bits(torch.int32, 0x7FFFFFFF, 0x7F800000),
}


class HostKernels:
    """``Kernels`` on a CPU. For one thread at a time: all calls share the scratch."""

    def __init__(self, chunk: int = CHUNK) -> None:
        # Operations are dealt out evenly over torch's threads, so each finds its share in its own cache.
        self._chunk = chunk * torch.get_num_threads()
        self._scratch = torch.empty(2 * self._chunk)

    @torch.no_grad()
    def narrow(self, pieces: Sequence[Piece], wire: Tensor, scale: float) -> None:
        for values, target in _chunks(pieces, self._chunk, wire):
            if scale == 1.0:
                target.copy_(values)
            elif target.dtype == values.dtype:
                torch.mul(values, scale, out=target)
            else:
                target.copy_(torch.mul(values, scale, out=self._scratch[: values.numel()]))

    @torch.no_grad()
    def narrow_with_feedback(self, pieces: Sequence[Piece], residual: Tensor, wire: Tensor, scale: float) -> None:
        for values, left, target in _chunks(pieces, self._chunk, residual, wire):
            scratch = self._scratch[: values.numel()]
            left.add_(values)
            target.copy_(torch.mul(left, scale, out=scratch))
            # The reciprocal of a power of two is exact, and a division many times slower.
            left.sub_(scratch.copy_(target).mul_(1 / scale))
            torch.nan_to_num(left, nan=0.0, posinf=0.0, neginf=0.0, out=left)

    @torch.no_grad()
    def count(self, pieces: Sequence[Piece], wire: Tensor, scale: float) -> Tensor:
        chunk = min(self._chunk // 2, _COUNTABLE)
        found = [self._count(values, sent) for values, sent in _chunks(pieces, chunk, wire)]
        return torch.tensor([sum(kind) for kind in zip(*found, strict=True)] or [0] * 4, dtype=torch.int64)

    def _count(self, values: Tensor, wire: Tensor) -> tuple[int, int, int, int]:
        """Conditions as float32 numbers 0 and 1: as booleans, comparing and counting take ten times as long."""
        sent, one, two = self._scratch[: 3 * values.numel()].view(3, -1)
        sent.copy_(wire).abs_()
        underflow = torch.dot(torch.ne(values, 0, out=one), torch.eq(sent, 0, out=two))
        smallest_normal = torch.finfo(wire.dtype).smallest_normal
        subnormal = torch.dot(torch.lt(sent, smallest_normal, out=one), torch.gt(sent, 0, out=two))
        if torch.isfinite(sent.amax()):
            return 0, int(underflow), int(subnormal), 0
        bad = torch.isfinite(values).logical_not_()
        overflow = torch.isfinite(sent).logical_not_().gt_(bad)
        return int(overflow.sum()), int(underflow), int(subnormal), int(bad.sum())

    @torch.no_grad()
    def widen(self, parts: Sequence[Tensor], out: Tensor, scale: float) -> Tensor:
        start, magnitude, squares = 0, 0, 0.0
        for part in parts:
            for chunk in torch.split(part, self._chunk):
                target = out[start : start + chunk.numel()]
                start += chunk.numel()
                largest = self._largest(chunk)
                magnitude = max(magnitude, largest)
                target.copy_(chunk)
                if scale != 1.0:
                    target.mul_(scale)
                if largest:
                    squares += self._squares(target)
        return torch.tensor([_magnitude_of(magnitude, parts, scale), squares], dtype=torch.float64)

    def _largest(self, chunk: Tensor) -> int:
        """The largest magnitude in it, as bits. Empty chunks come from empty parts."""
        if not chunk.numel():
            return 0
        bits = _BITS[chunk.dtype]
        space = self._scratch.view(bits.integer)[: chunk.numel()]
        return int(torch.bitwise_and(chunk.view(bits.integer), bits.magnitude, out=space).amax())

    def _squares(self, chunk: Tensor) -> float:
        squares = float(torch.dot(chunk, chunk))
        if _SQUARES_TRUSTED < squares < float("inf"):
            return squares
        wide = self._scratch.view(torch.float64)[: chunk.numel()].copy_(chunk)
        return float(torch.dot(wide, wide))

    @torch.no_grad()
    def sum_rows(self, rows: Sequence[Tensor], out: Tensor) -> None:
        if len(rows) == 2:
            # torch adds two numbers of a narrow type in float32 and rounds once: the tree itself.
            torch.add(rows[0], rows[1], out=out)
            return
        levels = 1 + (len(rows) - 1).bit_length()
        chunk = 2 * self._chunk // levels
        scratch = self._scratch[: levels * chunk].view(levels, chunk)
        for start in range(0, out.numel(), chunk):
            target = out[start : start + chunk]
            parts = [row[start : start + chunk] for row in rows]
            target.copy_(_tree(parts, [level[: target.numel()] for level in scratch]))


def _chunks(pieces: Sequence[Piece], size: int, *flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each chunk of each piece its values, and the same elements of each ``flat``."""
    for piece in pieces:
        start = piece.start
        for values in torch.split(piece.values, size) if piece.values.numel() else ():
            stop = start + values.numel()
            yield values, *(tensor[start:stop] for tensor in flat)
            start = stop


def _magnitude_of(bits: int, parts: Sequence[Tensor], scale: float) -> float:
    """The number that ``bits`` are in the parts' dtype, times ``scale`` in float32; inf for NaN."""
    if not bits:
        return 0.0
    format_ = _BITS[parts[0].dtype]
    number = torch.tensor([bits], dtype=format_.integer).view(parts[0].dtype).to(torch.float32)
    return float(number.mul_(scale)) if bits < format_.infinity else float("inf")


def _tree(rows: Sequence[Tensor], scratch: Sequence[Tensor]) -> Tensor:
    """The sum of ``rows`` in float32, neighbours first; lies in ``scratch`` [levels] or is the only row."""
    if len(rows) == 1:
        return rows[0] if rows[0].dtype == scratch[0].dtype else scratch[0].copy_(rows[0])
    middle = 1 << ((len(rows) - 1).bit_length() - 1)
    first = _tree(rows[:middle], scratch)
    return torch.add(first, _tree(rows[middle:], scratch[1:]), out=scratch[0])
