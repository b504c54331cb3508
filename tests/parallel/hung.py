"""A small training whose chosen rank hangs in a chosen place; test_faults runs it.

build: as it builds its loaders; eval: as it loads the second batch of the evaluation; note: as it writes that down;
flush: as it brings its sample log to the disk, for the checkpoint that follows.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hpctrain.data.types import Batch, Loader, Request
from hpctrain.launch.continuing import TrainCommand
from hpctrain.metrics.steplog import StepLog
from hpctrain.topology.ranks import detect
from hpctrain.train import build
from hpctrain.train.main import train_command
from hpctrain.train.samples import SampleLog
from tests.unit.small_runs import recipe

PLACES = ("build", "eval", "note", "flush")
# The ranks of a busy machine may be seconds apart in their start.
TIMEOUT_S, STARTUP_TIMEOUT_S = 10.0, 25.0


def hang(*_: Any, **__: Any) -> Any:
    time.sleep(1000)


class HungLoader:
    """``inner``, whose second batch of an evaluation never comes."""

    def __init__(self, inner: Loader) -> None:
        self.name, self.corrupt, self.close = inner.name, inner.corrupt, inner.close
        self._inner = inner

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for number, batch in enumerate(self._inner.load(requests), start=1):
            if batch.request.mode == "eval" and number == 2:
                hang()
            yield batch


def hang_in(place: str) -> None:
    """Let this process hang in ``place``."""
    make_loader: Any = build.make_loader
    if place == "build":
        build.make_loader = hang
    elif place == "eval":
        build.make_loader = lambda *args, **options: HungLoader(make_loader(*args, **options))
    elif place == "note":
        StepLog.evaluation = hang  # type: ignore[method-assign]
    elif place == "flush":
        SampleLog.flush = hang  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--place", choices=PLACES, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    args = parser.parse_args()
    if detect(os.environ).rank == args.rank:
        hang_in(args.place)
    config = recipe(
        comm={"engine": args.engine, "timeout_s": TIMEOUT_S, "startup_timeout_s": STARTUP_TIMEOUT_S},
        data={"log_samples": True},
        train={"epochs": 1, "batch_per_worker": 1},
        checkpoint={"every_steps": 50},
    )
    train_command(config, TrainCommand(Path("hung")), resume="never", run_dir=args.run_dir)


if __name__ == "__main__":
    main()
