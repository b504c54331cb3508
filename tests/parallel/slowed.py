"""A small training whose chosen rank is slow in a chosen phase for a while; test_stragglers_ranks runs it.

Every step works ``WORK_S`` in forward and as long in data and backward, asleep, so that a loaded machine hardly counts.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from hpctrain.data.types import Batch, Loader, Request
from hpctrain.launch.continuing import TrainCommand
from hpctrain.topology.ranks import detect
from hpctrain.train import build
from hpctrain.train.main import train_command
from tests.unit.small_runs import recipe, without_picture

WORK_S = 0.06
EVERY, FIRST_SLOW, LAST_SLOW, STEPS = 5, 11, 20, 35


class Pace:
    """How long this rank sleeps in each phase of the step it is in, counted from 1."""

    def __init__(self, phase: str, factor: float) -> None:
        self.phase, self.factor, self.step = phase, factor, 0

    def work(self, phase: str) -> None:
        slow = phase == self.phase and FIRST_SLOW <= self.step <= LAST_SLOW
        # The factor is that of all three phases.
        time.sleep(WORK_S * (1 + 3 * (self.factor - 1) if slow else 1))


class SlowLoader:
    """``inner``, at this rank's pace."""

    def __init__(self, inner: Loader, pace: Pace) -> None:
        self.name, self.corrupt, self.close = inner.name, inner.corrupt, inner.close
        self._inner, self._pace = inner, pace

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for batch in self._inner.load(requests):
            if batch.request.mode == "train":
                self._pace.step += 1
                self._pace.work("data")
            yield batch


def slow_down(pace: Pace) -> None:
    """Let what is built from now on in this process keep ``pace``."""
    make_loader, build_model = build.make_loader, build.build_model

    def slow_loader(*args: Any, **options: Any) -> Loader:
        return SlowLoader(make_loader(*args, **options), pace)

    def slow_model(*args: Any, **options: Any) -> torch.nn.Module:
        model = build_model(*args, **options)

        def after_forward(_: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
            if model.training:
                pace.work("forward")
                output.register_hook(lambda gradient: pace.work("backward"))

        model.register_forward_hook(after_forward)
        return model

    build.make_loader = slow_loader
    build.build_model = slow_model


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--phase", required=True)
    parser.add_argument("--factor", type=float, required=True)
    parser.add_argument("--run-dir", type=Path, required=True)
    args = parser.parse_args()
    slow_down(Pace(args.phase if detect(os.environ).rank == args.rank else "none", args.factor))
    config = recipe(
        comm={"engine": args.engine},
        train={"epochs": 40, "max_steps": STEPS, "batch_per_worker": 4},
        checkpoint={"every_steps": 1000},
        log={"every_steps": EVERY},
    )
    with without_picture():
        train_command(config, TrainCommand(Path("slowed")), resume="never", run_dir=args.run_dir)


if __name__ == "__main__":
    main()
