"""Which cores a rank may call its own, by what all ranks of its host are bound to, and what Slurm says of its node."""

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


def node_name(host: str) -> str:
    """The name by which Slurm knows this node, as in --exclude; outside of a job the ``host``'s own."""
    return os.environ.get("SLURMD_NODENAME") or host


def number_in(variable: str) -> int:
    """The whole number in a variable of the environment, such as SLURM_GPUS_ON_NODE; 0 where it is unset or is none."""
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdecimal() else 0
