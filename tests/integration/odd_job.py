"""`hpctrain` in a job with a fault: ``odd_job.py FAULT RANK ARGV...``, each rank as if on a host of its own.

slow, wrong: the rank's matrix products are; early: its clock is; misplaced: it does not see the run directory, and
takes the GPU of rank 0.
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from hpctrain import cli
from hpctrain.doctor import clocks, job, shared, speed
from hpctrain.doctor.place import RankPlace
from hpctrain.topology.ranks import Topology

#: far above what a busy machine adds to a product of some milliseconds
_SLOW_S = 1.0
_AHEAD_S = 1000.0


def main() -> None:
    fault, rank = sys.argv[1], int(sys.argv[2])
    sys.argv = ["hpctrain", *sys.argv[3:]]
    own_place, multiply = job.own_place, speed.multiply

    def place_alone(topology: Topology, *details: Any) -> RankPlace:
        if topology.rank == rank:
            spoil(fault)
        gpu = "GPU-1" if fault == "misplaced" and topology.rank in (0, rank) else ""
        host = "n0" if gpu else f"n{topology.rank}"
        return replace(own_place(topology, *details), host=host, node=f"node{topology.rank}", gpu=gpu)

    def spoil(fault: str) -> None:
        if fault in ("slow", "wrong"):
            speed.multiply = slow if fault == "slow" else wrong
        elif fault == "early":
            clocks.time = SimpleNamespace(time=lambda: time.time() + _AHEAD_S)  # type: ignore[assignment]
        else:
            shared._reads = lambda path: False

    def slow(matrix: Tensor, output: Tensor) -> None:
        time.sleep(_SLOW_S)
        multiply(matrix, output)

    def wrong(matrix: Tensor, output: Tensor) -> None:
        multiply(matrix, output)
        output[3, 4] += 1

    job.own_place = place_alone
    cli.main()


if __name__ == "__main__":
    main()
