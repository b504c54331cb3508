"""By how much the clocks of hosts differ, as bounds that hold however long messages take.

A collective ends on no rank before all have entered it. So a rank's time before it, ``before``, is earlier than any
other's ``after``, each on its own clock, and with d = clock of i - clock of j:

    before[i] - after[j]  <=  d  <=  after[i] - before[j]

No rank that comes late, or is slow, makes a sound clock look wrong: it only widens the bounds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from hpctrain.comm.base import Communicator

#: (seconds before, seconds after) a collective, by rank
Reading = Sequence[Sequence[float]]

_ROUNDS = 3


def read_clocks(comm: Communicator) -> list[Reading]:
    """Readings of all ranks around a few barriers. Collective."""
    mine = []
    for _ in range(_ROUNDS):
        before = time.time()
        comm.barrier()
        mine.append((before, time.time()))
    by_rank = comm.all_gather_object(mine)
    return [[rounds[number] for rounds in by_rank] for number in range(_ROUNDS)]


def certain_difference_s(readings: Sequence[Reading], rank: int, other: int) -> float:
    """Seconds by which ``rank``'s clock is certainly ahead of ``other``'s (behind: negative); 0 if they may agree."""
    lower = max(reading[rank][0] - reading[other][1] for reading in readings)
    upper = min(reading[rank][1] - reading[other][0] for reading in readings)
    return max(0.0, lower) if lower > 0 else min(0.0, upper)
