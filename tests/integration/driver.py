"""`hpctrain` with a fault built in: ``driver.py RANK STEP ARGV...`` raises on one rank within one step."""

from __future__ import annotations

import sys

from hpctrain import cli
from hpctrain.train import step


def main() -> None:
    rank, at_step = int(sys.argv[1]), int(sys.argv[2])
    sys.argv = ["hpctrain", *sys.argv[3:]]
    original = step.seed_micro_batch

    def seed_micro_batch(seed: int, micro_step: int, worker: int) -> None:
        if (worker, micro_step) == (rank, at_step):
            raise ZeroDivisionError("a fault of the program")
        original(seed, micro_step, worker)

    step.seed_micro_batch = seed_micro_batch
    cli.main()


if __name__ == "__main__":
    main()
