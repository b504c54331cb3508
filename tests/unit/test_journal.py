"""What is told while a run goes on: figures of all ranks, on rank 0's sinks, and a divergence on any of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpctrain.errors import UserError
from hpctrain.metrics.clock import Interval
from hpctrain.metrics.progress import SilentDisplay
from hpctrain.metrics.steplog import EvalFigures, StepFigures
from hpctrain.metrics.stragglers import StragglerWatch
from hpctrain.train.journal import Journal, not_finite
from hpctrain.train.parts import Parts
from hpctrain.train.state import Evaluation, Progress
from tests.unit.fake_group import FakeCommunicator, run_group
from tests.unit.small_runs import parts_of, recipe


class Kept:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.steps: list[StepFigures] = []
        self.evaluations: list[EvalFigures] = []
        self.closed = 0

    def step(self, figures: StepFigures) -> None:
        self.steps.append(figures)

    def evaluation(self, figures: EvalFigures) -> None:
        self.evaluations.append(figures)

    def close(self) -> None:
        self.closed += 1


def journal_of(parts: Parts, *sinks: Kept, corrupt: tuple[str, ...] = ()) -> Journal:
    feeds: Any = SimpleNamespace(corrupt=list(corrupt))
    return Journal(parts, feeds, SilentDisplay(), sinks, Path("runs/small"))


def step(parts: Parts, progress: Progress) -> None:
    parts.clock.step(progress.step)
    progress.advance(parts.plan.batch_global, parts.plan.batch_global)
    parts.clock.end_step()


def test_the_loss_is_the_mean_over_steps_and_ranks() -> None:
    def rank(comm: FakeCommunicator) -> list[StepFigures]:
        parts, progress, kept = parts_of(recipe(train={"batch_per_worker": 4}), comm), Progress(), Kept()
        journal = journal_of(parts, *([kept] if comm.rank == 0 else []))
        for value in (1.0, 2.0, 6.0):
            step(parts, progress)
            journal.add(torch.tensor(value + 10 * comm.rank))
        journal.log(progress)
        journal.log(progress)
        return kept.steps

    told, nothing = run_group(2, rank)
    assert nothing == []
    (line,) = told
    assert (line.step, line.loss, line.lr) == (3, 8.0, 0.05)
    assert line.epoch == pytest.approx(3 / 12)
    assert line.counters["samples_seen"] == 24
    assert line.images_per_s > 0 and "loss_scale" not in line.counters


def test_the_rate_told_is_that_of_the_step_just_done() -> None:
    parts, progress, kept = parts_of(recipe(schedule={"kind": "cosine", "lr": 0.4})), Progress(), Kept()
    journal = journal_of(parts, kept)
    step(parts, progress)
    journal.add(torch.tensor(1.0))
    journal.log(progress)
    assert kept.steps[0].lr == 0.4


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_after_it_is_logged() -> None:
    def rank(comm: FakeCommunicator) -> tuple[str, int]:
        parts, progress, kept = parts_of(recipe(train={"batch_per_worker": 4}), comm), Progress(), Kept()
        journal = journal_of(parts, kept)
        for _ in range(2):
            step(parts, progress)
            journal.add(torch.tensor(float("nan") if comm.rank else 1.0))
        with pytest.raises(UserError) as caught:
            journal.log(progress)
        return str(caught.value), len(kept.steps)

    sentence = (
        "the loss became NaN or infinite between steps 1 and 2 (learning rate 0.05); lower schedule.lr or "
        "lengthen schedule.warmup_epochs, and continue from the last checkpoint with --run-dir runs/small"
    )
    assert run_group(2, rank) == [(sentence, 1)] * 2


def test_one_step_is_named_by_itself() -> None:
    assert "became NaN or infinite in step 7 (learning rate 0.1); " in str(not_finite("loss", 7, 7, 0.1, Path("run")))


def test_an_evaluation_is_told_with_its_seconds() -> None:
    parts, kept = parts_of(recipe()), Kept()
    progress = Progress(step=12, position=96)
    journal_of(parts, kept).evaluation(progress, Evaluation(top1=0.5, top5=1.0, loss=2.0, seen=4), 1.5)
    (told,) = kept.evaluations
    assert (told.step, told.epoch, told.top1, told.seen, told.seconds) == (12, 1.0, 0.5, 4, 1.5)


def test_the_loss_scale_of_fp16_is_logged() -> None:
    parts, progress, kept = parts_of(recipe(train={"precision": "fp16"})), Progress(), Kept()
    journal = journal_of(parts, kept)
    step(parts, progress)
    journal.add(torch.tensor(1.0))
    journal.log(progress)
    assert kept.steps[0].counters["loss_scale"] == 2.0**16


def test_ranks_agree_on_what_is_corrupt() -> None:
    """Samples met by one rank or by several are counted once, in an order that is the same on all."""
    shown = ("b.jpg: cut", "a.jpg: cut")

    def rank(comm: FakeCommunicator) -> list[str]:
        config = recipe(train={"batch_per_worker": 4}, data={"max_corrupt_share": 0.5})
        parts, progress = parts_of(config, comm), Progress(corrupt=["old.jpg: cut"])
        mine = {0: ("old.jpg: cut",), 1: shown[:1], 2: shown}[comm.rank]
        journal = journal_of(parts, corrupt=mine)
        step(parts, progress)
        journal.add(torch.tensor(1.0))
        journal.log(progress)
        return progress.corrupt

    assert run_group(3, rank) == [["old.jpg: cut", *shown]] * 3


def test_a_slow_rank_is_told_and_costs_no_collective_of_its_own() -> None:
    """Of figures that each rank has measured by itself; fewer than five steps are no ground for a judgement."""

    def rank(comm: FakeCommunicator) -> tuple[list[StepFigures], int]:
        own_s = 0.1 if comm.rank == 1 else 0.05
        phases_s = {"data": 0.01, "forward": own_s, "backward": 0.1, "exposed_comm": 0.3 - own_s, "optimizer": 0.0}
        clock: Any = SimpleNamespace(recent=lambda steps: Interval(min(steps, progress.step), 1.0, phases_s))
        clock.interval = lambda: clock.recent(1)
        parts, progress, kept = parts_of(recipe(train={"batch_per_worker": 4}), comm), Progress(), Kept()
        journal = journal_of(replace(parts, clock=clock), kept)
        before = len(comm.group.log[comm.rank])
        for _ in range(6):
            progress.advance(12, 12)
            journal.add(torch.tensor(1.0))
            journal.log(progress)
        return kept.steps, len(comm.group.log[comm.rank]) - before

    for told, collectives in run_group(3, rank):
        assert collectives == len(told) == 6
        assert [len(line.stragglers) for line in told] == [0, 0, 0, 0, 1, 1]
        (straggler,) = told[-1].stragglers
        assert (straggler.rank, straggler.host, straggler.phase) == (1, "host1", "forward")
        assert (straggler.factor, straggler.first_step, straggler.last_step) == (pytest.approx(0.21 / 0.16), 1, 5)


@pytest.mark.parametrize(
    ("logged", "judged"),
    [
        (range(1, 13), [(1, 5), (6, 10)]),
        ((20, 23, 40, 46), [(1, 20), (21, 40), (41, 46)]),  # an epoch ended after step 23
    ],
)
def test_each_step_is_judged_once(
    logged: Iterable[int], judged: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = []
    monkeypatch.setattr(StragglerWatch, "judge", lambda self, seconds, first, last: windows.append((first, last)) or [])
    parts, progress = parts_of(recipe()), Progress()
    journal = journal_of(parts)
    for end in logged:
        while progress.step < end:
            step(parts, progress)
            journal.add(torch.tensor(1.0))
        journal.log(progress)
    assert windows == judged


def test_all_sinks_are_closed() -> None:
    first, second = Kept(), Kept()
    journal_of(parts_of(recipe()), first, second).close()
    assert (first.closed, second.closed) == (1, 1)
