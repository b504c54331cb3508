"""`hpctrain` with one more reduction, which fails on rank 1: ``faulty_sum.py wrong|hangs ARGV...``."""

from __future__ import annotations

import sys
import time

from hpctrain import cli
from hpctrain.gradients.reduction import EngineReduction
from hpctrain.gradients.registry import REDUCTIONS


class Wrong(EngineReduction):
    """Loses an element."""

    def wait(self) -> None:
        super().wait()
        if self.comm.rank == 1:
            self.buffer[3] = 0


class Hangs(EngineReduction):
    """Never takes part."""

    def start(self) -> None:
        if self.comm.rank == 1:
            time.sleep(3600)
        super().start()


def main() -> None:
    fault, *argv = sys.argv[1:]
    REDUCTIONS[fault] = {"wrong": Wrong, "hangs": Hangs}[fault]
    sys.argv = ["hpctrain", *argv]
    cli.main()


if __name__ == "__main__":
    main()
