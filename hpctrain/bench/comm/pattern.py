"""What ranks send in a check, and what they must then hold: whole numbers whose sums are exact in every dtype.

To a sum, every rank gives 1 at each place, and in turn one of them gives ``i mod PERIOD`` more, so place i must hold
world size + i mod PERIOD: a rank left out, counted twice, or a piece at the wrong place shows. Where nothing is
summed, each place tells its own number and the rank it comes from. Both repeat, so a buffer of any size is written
and compared in pieces that stay in the processor's cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hpctrain.errors import UserError

#: a prime, so that no shift by a power of two goes unseen
PERIOD = 127
_MOVED_PERIOD = 8191
_PIECE = 1 << 16
#: the whole numbers up to which each dtype has them all
_EXACT_UP_TO = {torch.float16: 2**11, torch.bfloat16: 2**8, torch.float32: 2**24}


@dataclass(frozen=True)
class Wrong:
    """The first element that is not as it must be, and how many are not."""

    count: int
    index: int
    found: float
    expected: float


class Pattern:
    """The sequence that repeats ``values`` [period]."""

    def __init__(self, values: Tensor) -> None:
        self._period = values.numel()
        self._length = -(-_PIECE // self._period) * self._period
        # One period more than a piece, so that a piece may begin anywhere in it.
        self._table = values.repeat(self._length // self._period + 1)

    def fill(self, buffer: Tensor, start: int = 0) -> None:
        """Write the sequence, from its element ``start`` on, into ``buffer`` [n]."""
        phase = start % self._period
        for piece in torch.split(buffer, self._length):
            piece.copy_(self._table[phase : phase + piece.numel()])

    def find_wrong(self, buffer: Tensor, start: int = 0) -> Wrong | None:
        """How ``buffer`` [n] differs from the sequence as ``fill`` writes it; None where it does not."""
        phase, count, first = start % self._period, 0, None
        for number, piece in enumerate(torch.split(buffer, self._length)):
            expected = self._table[phase : phase + piece.numel()]
            if torch.equal(piece, expected):
                continue
            places = piece.ne(expected).nonzero().view(-1)
            at = int(places[0])
            first = first or Wrong(0, number * self._length + at, piece[at].item(), expected[at].item())
            count += places.numel()
        return Wrong(count, first.index, first.found, first.expected) if first else None


def summand(world_size: int, rank: int, dtype: torch.dtype, device: torch.device) -> Pattern:
    """What ``rank`` gives to a sum. Raises UserError where sums over so many ranks are not exact in ``dtype``."""
    limit = _EXACT_UP_TO[dtype] - PERIOD + 1
    if world_size > limit:
        raise UserError(
            f"sums over {world_size} ranks cannot be checked exactly in {str(dtype).removeprefix('torch.')}, "
            f"at most {limit} can: leave this dtype out"
        )
    places = torch.arange(PERIOD * world_size, device=device)
    mine = (places + rank) % world_size == 0
    return Pattern((1 + mine * (places % PERIOD)).to(dtype))


def total(world_size: int, dtype: torch.dtype, device: torch.device) -> Pattern:
    """The sum of all ranks' summands."""
    return Pattern((world_size + torch.arange(PERIOD, device=device)).to(dtype))


def sent_by(rank: int, device: torch.device) -> Pattern:
    """What ``rank`` sends where nothing is summed: int32, different at each place and on each rank."""
    return Pattern((rank * _MOVED_PERIOD + torch.arange(_MOVED_PERIOD, device=device)).to(torch.int32))
