"""Which cores a rank may call its own, from what all ranks of its host are bound to."""

from __future__ import annotations

import os
from collections.abc import Sequence

Binding = tuple[str, Sequence[int]]


def own_binding(host: str) -> Binding:
    """This process's host and the numbers of the cores it may run on."""
    return host, sorted(os.sched_getaffinity(0))


def cores_of(rank: int, bindings: Sequence[Binding]) -> int:
    """Cores for ``rank`` when each core is shared evenly by the ranks bound to it; at least 1.

    ``bindings`` holds (host, core numbers) by rank. Launchers differ: some bind each rank to cores of its own,
    some leave all cores of the host to all of its ranks.
    """
    host, cores = bindings[rank]
    mine = set(cores)
    sharers = [set(other) for other_host, other in bindings if other_host == host and mine & set(other)]
    share = sum(1 / sum(core in other for other in sharers) for core in mine)
    return max(1, int(share + 1e-9))
