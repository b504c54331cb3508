"""What one rank does for test_jobs: join an engine's world, sum a buffer, report the place and the sum."""

from __future__ import annotations

import os
import sys

import torch

from hpctrain.comm import registry
from hpctrain.topology.ranks import detect
from tests.parallel.launch import report


def main() -> None:
    engine, elements = sys.argv[1], int(sys.argv[2])
    comm = registry.create(engine, detect(os.environ), torch.device("cpu"), timeout_s=30)
    buffer = torch.full((elements,), float(comm.rank + 1))
    comm.all_reduce_(buffer).wait()
    place = comm.topology
    report({"host": place.host, "num_nodes": place.num_nodes, "local_size": place.local_size, "sum": float(buffer[-1])})
    comm.close()


if __name__ == "__main__":
    main()
