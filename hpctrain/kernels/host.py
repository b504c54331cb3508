"""The gradient kernels for host memory: torch's vectorised operations on chunks that stay in a core's cache.

What costs time on a CPU is the passes over memory: each kernel reads its input once and writes its output once,
and all that happens in between happens to one chunk at a time, in scratch that is allocated once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hpctrain.kernels.base import Piece

#: Elements a thread works on at a time. With the scratch, 8 bytes an element, and the wire that makes 1 MiB, the
#: second-level cache of a core of today's servers; much less costs time in calls, more in misses.
CHUNK = 96 << 10
#: Elements up to which it is quicker to put neighbours together than to make the calls for each.
_SMALL = 4096
#: Below it, squares in float32 may have vanished that count; from it on, all that vanish are beyond its digits.
_SQUARES_TRUSTED = 2.0**-80
#: Whole numbers up to here are exact in float32.
_COUNTABLE = 1 << 24


class HostKernels:
    """``Kernels`` on a CPU. For one thread at a time: all calls share the scratch."""

    def __init__(self, chunk: int = CHUNK) -> None:
        # Operations are dealt out evenly over torch's threads, so each finds its share in its own cache.
        self._chunk = chunk * torch.get_num_threads()
        self._scratch = torch.empty(2 * self._chunk)

    @torch.no_grad()
    def narrow(self, pieces: Sequence[Piece], wire: Tensor, scale: float) -> None:
        for values, target in _chunks(self._gathered(pieces), self._chunk, wire):
            if scale == 1.0:
                target.copy_(values)
            elif target.dtype == values.dtype:
                torch.mul(values, scale, out=target)
            else:
                target.copy_(torch.mul(values, scale, out=self._scratch[: values.numel()]))

    def _gathered(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """The pieces, small ones that lie side by side as one."""
        for run in _runs(pieces, self._chunk):
            if len(run) == 1:
                yield run[0]
                continue
            values = [piece.values for piece in run]
            # In the half of the scratch that products do not go to.
            together = self._scratch[self._chunk :][: sum(value.numel() for value in values)]
            yield Piece(torch.cat(values, out=together), run[0].start)

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
    def widen(
        self, parts: Sequence[Tensor], out: Tensor, scale: float, share: slice | None = None, *, norm: bool = True
    ) -> Tensor:
        start, magnitude, squares = 0, 0.0, 0.0
        share = share or slice(0, out.numel())
        for part in parts:
            for chunk in torch.split(part, self._chunk):
                target = out[start : start + chunk.numel()]
                magnitude = max(magnitude, _largest(chunk[max(share.start - start, 0) : max(share.stop - start, 0)]))
                start += chunk.numel()
                target.copy_(chunk)
                if scale != 1.0:
                    target.mul_(scale)
                if norm:
                    squares += self._squares(target)
        # In float32, as the elements themselves were scaled.
        return torch.tensor([float(torch.tensor(magnitude).mul_(scale)), squares], dtype=torch.float64)

    @torch.no_grad()
    def measure(self, tensors: Sequence[Tensor], *, norm: bool) -> Tensor:
        magnitude = max((_largest(tensor) for tensor in tensors), default=0.0)
        squares = sum(map(self._squares, _flat_chunks(tensors, self._chunk))) if norm else 0.0
        return torch.tensor([magnitude, squares], dtype=torch.float64)

    def _squares(self, chunk: Tensor) -> float:
        squares = float(torch.dot(chunk, chunk))
        if _SQUARES_TRUSTED < squares < math.inf or not torch.count_nonzero(chunk):
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


def _runs(pieces: Sequence[Piece], room: int) -> Iterator[list[Piece]]:
    """Groups of consecutive pieces: small ones without a gap between them, up to ``room`` elements; others alone."""
    run: list[Piece] = []
    start = end = -1
    for piece in pieces:
        length = piece.values.numel()
        if run and (piece.start != end or length > _SMALL or piece.start + length - start > room):
            yield run
            run = []
        if not run:
            start = piece.start
        run.append(piece)
        # Nothing follows a large one.
        end = piece.start + length if length <= _SMALL else -1
    if run:
        yield run


def _chunks(pieces: Iterable[Piece], size: int, *flat: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """For each chunk of each piece its values, and the same elements of each ``flat``."""
    for piece in pieces:
        start = piece.start
        for values in torch.split(piece.values, size) if piece.values.numel() else ():
            stop = start + values.numel()
            yield values, *(tensor[start:stop] for tensor in flat)
            start = stop


def _flat_chunks(tensors: Sequence[Tensor], size: int) -> Iterator[Tensor]:
    """The elements of tensors of any strides, ``size`` at a time; a copy where they do not lie without gaps."""
    for tensor in tensors:
        if not tensor.is_contiguous() and torch.ops.aten.is_non_overlapping_and_dense(tensor):
            tensor = tensor.as_strided((tensor.numel(),), (1,))
        yield from torch.split(tensor.reshape(-1), size)


def _largest(values: Tensor) -> float:
    """The largest magnitude, inf where anything is inf or NaN."""
    if not values.numel():
        return 0.0
    low, high = torch.aminmax(values)
    largest = max(-float(low), float(high))
    return math.inf if math.isnan(largest) else largest


def _tree(rows: Sequence[Tensor], scratch: Sequence[Tensor]) -> Tensor:
    """The sum of ``rows`` in float32, neighbours first; lies in ``scratch`` [levels] or is the only row."""
    if len(rows) == 1:
        return rows[0] if rows[0].dtype == scratch[0].dtype else scratch[0].copy_(rows[0])
    middle = 1 << ((len(rows) - 1).bit_length() - 1)
    first = _tree(rows[:middle], scratch)
    return torch.add(first, _tree(rows[middle:], scratch[1:]), out=scratch[0])
