"""The loop: when it stops, evaluates and saves, and that nothing which is not finite is ever saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from hpctrain.comm.turns import Stopped
from hpctrain.comm.watch import Watch
from hpctrain.config.schema import Config
from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.layout import list_checkpoints
from hpctrain.topology.phases import PHASES
from hpctrain.train import loop as module
from hpctrain.train import saver
from hpctrain.train.build import Feeds
from hpctrain.train.checkpoint import load_checkpoint
from hpctrain.train.saver import all_finite
from hpctrain.train.state import Evaluation
from tests.unit.small_runs import lines_of, recipe, run_here, run_on, saved_steps


def evaluated_steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines_of(folder / "evals.jsonl")]


def pretend(monkeypatch: pytest.MonkeyPatch, *top1: float) -> None:
    """Evaluations give these figures in turn, and the last one for ever."""
    left = list(top1)

    def evaluate(self: Feeds) -> Evaluation:
        figure = left.pop(0) if len(left) > 1 else left[0]
        return Evaluation(top1=figure, top5=1.0, loss=1.0 - figure, seen=4)

    monkeypatch.setattr(Feeds, "evaluate", evaluate)


@pytest.mark.parametrize(
    ("train", "checkpoint", "evaluated", "saved"),
    [
        # an epoch has 12 steps, and a checkpoint follows the evaluation of its epoch
        ({"epochs": 3}, {"every_steps": None}, [12, 24, 36], [12, 24, 36]),
        ({"epochs": 3, "eval_every_epochs": 2}, {"every_steps": 10}, [24, 36], [10, 20, 30, 36]),
        ({"epochs": 2, "eval_every_epochs": None}, {"every_steps": 12}, [], [12, 24]),
        ({"epochs": 4, "max_steps": 15, "eval_every_epochs": 4}, {"every_steps": None}, [15], [12, 15]),
        ({"epochs": 3, "max_steps": 36}, {"every_steps": 7, "keep": 2}, [12, 24, 36], [35, 36]),
        ({"epochs": 1, "last_batch": "pad"}, {"every_steps": 100}, [13], [13]),
    ],
)
def test_when_it_evaluates_and_saves(
    tmp_path: Path, train: dict[str, Any], checkpoint: dict[str, Any], evaluated: list[int], saved: list[int]
) -> None:
    record = run_here(recipe(train=train, checkpoint=checkpoint), tmp_path)
    assert record["ended"] == "finished"
    assert saved_steps(tmp_path) == saved
    assert record["steps"] == saved[-1]
    assert (evaluated_steps(tmp_path) if evaluated else []) == evaluated
    assert record["accuracy"]["seen"] == (4 if evaluated else 0)


@pytest.fixture
def stood(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Where the watch saw this rank stand, one after the other, as ``lateness`` compares it."""
    found: list[tuple[int, int, int]] = []

    def noting(original: Callable[..., None]) -> Callable[..., None]:
        def note(self: Watch, *place: Any) -> None:
            original(self, *place)
            step, phase, ticks = self._mark
            found.append((step, PHASES.index(phase), ticks))

        return note

    for name in ("beat", "tick"):
        monkeypatch.setattr(Watch, name, noting(getattr(Watch, name)))
    return found


def test_a_rank_that_has_done_more_stands_later(tmp_path: Path, stood: list[tuple[int, int, int]]) -> None:
    """A hang is blamed on those that stand earliest: through steps, evaluations and checkpoints."""
    run_here(recipe(train={"epochs": 2}, checkpoint={"every_steps": 6}), tmp_path)
    assert stood == sorted(set(stood))
    assert {PHASES[phase] for step, phase, _ in stood if step == 11} >= {"optimizer", "eval", "checkpoint"}


def stop_in_its_evaluation(config: Config, folder: Path) -> None:
    """Train up to an evaluation, and be asked to stop there: it is still owed."""

    def stop(self: Feeds) -> Evaluation:
        raise Stopped("SIGTERM")

    with mock.patch.object(Feeds, "evaluate", stop), pytest.raises(SystemExit):
        run_here(config, folder)


def test_a_launch_that_owes_an_evaluation_stands_behind_the_step_before(
    tmp_path: Path, stood: list[tuple[int, int, int]]
) -> None:
    stop_in_its_evaluation(recipe(train={"epochs": 2}), tmp_path)
    stood.clear()
    run_here(recipe(train={"epochs": 2}), tmp_path)
    assert stood == sorted(set(stood))
    begun = [(step, PHASES[phase]) for step, phase, _ in stood if PHASES[phase] != "start"]
    assert begun[0] == (11, "eval") and (12, "data") in begun


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("train", "judged"),
    [
        ({"eval_every_epochs": None}, 0),
        ({"max_steps": 10}, 4),  # fewer than were taken
    ],
)
def test_what_is_owed_at_the_end_is_paid_or_let_off(tmp_path: Path, train: dict[str, Any], judged: int) -> None:
    """The run ends there and then, whatever was set anew: it does not go on for ever, nor past its end."""
    stop_in_its_evaluation(recipe(train={"epochs": 1}), tmp_path)
    record = run_here(recipe(train={"epochs": 1, **train}), tmp_path)
    assert (record["steps"], record["ended"]) == (12, "finished")
    assert record["accuracy"]["seen"] == judged


def test_samples_seen_leave_out_padding(tmp_path: Path) -> None:
    record = run_here(recipe(train={"epochs": 2, "last_batch": "pad"}), tmp_path)
    assert (record["steps"], record["data"]["samples_seen"]) == (26, 200)


def test_it_stops_at_the_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0.5, 0.8, 0.9)
    record = run_here(recipe(train={"target_accuracy": 0.8}), tmp_path)
    assert (record["steps"], record["ended"]) == (24, "target accuracy 0.8 reached")
    assert record["accuracy"]["top1"] == 0.8
    assert saved_steps(tmp_path)[-1] == 24


@pytest.mark.parametrize("monitor", ["val_top1", "val_loss"])
def test_it_stops_when_nothing_is_gained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, monitor: str) -> None:
    pretend(monkeypatch, 0.5, 0.6, 0.65, 0.65)
    stopping = {"monitor": monitor, "patience": 2, "min_delta": 0.08}
    record = run_here(recipe(train={"epochs": 9, "early_stopping": stopping}), tmp_path)
    assert (record["steps"], record["ended"]) == (4 * 12, f"no gain in {monitor} over 2 evaluations")


def test_waiting_for_a_gain_survives_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 0.5)
    config = recipe(train={"epochs": 9, "max_steps": 24, "early_stopping": {"patience": 3}})
    assert run_here(config, tmp_path)["ended"] == "finished"
    longer = recipe(train={"epochs": 9, "early_stopping": {"patience": 3}})
    assert run_here(longer, tmp_path)["steps"] == 4 * 12


@pytest.mark.parametrize("log_every", [1, 7, 1000])
def test_a_run_that_diverges_ends_with_a_sentence_and_a_sound_checkpoint(tmp_path: Path, log_every: int) -> None:
    """Whether the loss is looked at each step or only when something is saved."""
    spread = {"schedule": {"kind": "constant", "lr": 1e12}, "log": {"every_steps": log_every}}
    with pytest.raises(
        UserError, match=r"became NaN or infinite (in step|between steps \d+ and) \d+ \(learning rate 1e\+12\)"
    ):
        run_here(recipe(checkpoint={"every_steps": 2}, **spread), tmp_path)
    assert not (tmp_path / "record.json").exists()
    for path in list_checkpoints(tmp_path / "checkpoints"):
        for tensors in load_checkpoint(path).tensors.values():
            assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, at_step: int, value: float) -> None:
    """Replace the gradients of one step, after their exchange."""
    original = module.train_step

    def step(parts: Any, batches: Any, number: int) -> torch.Tensor:
        loss = original(parts, batches, number)
        if number == at_step:
            for parameter in parts.model.parameters():
                parameter.grad = torch.full_like(parameter, value)
            parts.optimizer.step()
        return loss

    monkeypatch.setattr(module, "train_step", step)


@pytest.mark.parametrize(("optimizer", "value"), [("sgd", float("nan")), ("adam", 1e30), ("rmsprop", 1e30)])
def test_nothing_that_is_not_finite_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, value: float
) -> None:
    """A second moment may overflow while the parameters it divides stay finite: such a state ends training too."""
    spoil_gradient(monkeypatch, 15, value)
    # Adam's first moment follows after a few steps, in units of the rate.
    schedule = {"kind": "constant", "lr": 1e-30}
    config = recipe(
        optimizer={"name": optimizer}, train={"max_steps": 20}, log={"every_steps": 1000}, schedule=schedule
    )
    message = r"the (loss|model or the optimizer's state) became NaN or infinite between steps \d\d and 20"
    with pytest.raises(UserError, match=message):
        run_here(config, tmp_path)
    assert saved_steps(tmp_path) == [10]
    monkeypatch.undo()
    assert run_here(config, tmp_path)["steps"] == 20, "it goes on from the last checkpoint"


def test_replicas_that_differ_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = module.train_step

    def step(parts: Any, batches: Any, number: int) -> torch.Tensor:
        loss = original(parts, batches, number)
        if number == 14 and parts.comm.rank == 1:
            with torch.no_grad():
                next(parts.model.parameters()).view(-1)[0] += 1
        return loss

    monkeypatch.setattr(module, "train_step", step)
    config = recipe(train={"batch_per_worker": 4, "max_steps": 30})
    with pytest.raises(MachineError, match=r"the replicas have diverged: rank 1 \(host1\) and rank 0 \(host0\)"):
        run_on(2, config, tmp_path)
    assert saved_steps(tmp_path) == [10]


def test_replicas_are_compared_between_checkpoints_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for asking in (module, saver):
        monkeypatch.setattr(asking, "check_replicas", lambda comm, named: asked.append(len(list(named))))
    run_here(
        recipe(gradients={"check_every_steps": 5}, train={"max_steps": 20}, checkpoint={"every_steps": 20}), tmp_path
    )
    assert asked == [4] * 5  # after steps 5, 10, 15, 20, and before the one checkpoint


def test_all_finite_looks_at_every_group_and_passes_over_counters() -> None:
    groups = {"model": dict(torch.nn.BatchNorm1d(3).state_dict()), "optimizer": {"exp_avg_sq/weight": torch.ones(3)}}
    assert all_finite(groups)
    for group, name in (("model", "running_var"), ("optimizer", "exp_avg_sq/weight")):
        spoilt = torch.tensor([1.0, float("inf"), 1.0])
        assert not all_finite(groups | {group: {**groups[group], name: spoilt}})
