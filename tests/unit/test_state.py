"""Counters of a run: what a step, an evaluation and an epoch do to them, and that JSON keeps them."""

from __future__ import annotations

import json

import pytest

from hpctrain.config.schema import EarlyStoppingConfig
from hpctrain.train.state import Evaluation, Progress


def result(top1: float, loss: float = 1.0) -> Evaluation:
    return Evaluation(top1=top1, top5=1.0, loss=loss, seen=10)


def test_a_step_counts_positions_and_samples_apart() -> None:
    progress = Progress()
    progress.advance(32, 32)
    progress.advance(32, 6)
    assert (progress.step, progress.position, progress.samples_seen) == (2, 64, 38)
    progress.next_epoch()
    assert (progress.step, progress.epoch, progress.position, progress.samples_seen) == (2, 1, 0, 38)


@pytest.mark.parametrize(
    ("monitor", "min_delta", "figures", "waited"),
    [
        ("val_top1", 0.0, [0.1, 0.2, 0.2, 0.15], [0, 0, 1, 2]),
        ("val_top1", 0.05, [0.10, 0.14, 0.16, 0.16], [0, 1, 0, 1]),
        ("val_loss", 0.0, [2.0, 1.0, 1.0, 0.5], [0, 0, 1, 0]),
        ("val_loss", 0.5, [2.0, 1.6, 1.4, 1.2], [0, 1, 0, 1]),
    ],
)
def test_evaluations_without_gain(monitor: str, min_delta: float, figures: list[float], waited: list[int]) -> None:
    """A gain is more than ``min_delta`` above the best so far, not above the last."""
    stopping = EarlyStoppingConfig.model_validate({"monitor": monitor, "min_delta": min_delta})
    progress, counted = Progress(), []
    for figure in figures:
        progress.take(result(figure) if monitor == "val_top1" else result(0.5, loss=figure), stopping)
        counted.append(progress.evaluations_without_gain)
    assert counted == waited


def test_without_early_stopping_nothing_is_counted() -> None:
    progress = Progress()
    for _ in range(3):
        progress.take(result(0.5), None)
    assert (progress.best_gain, progress.evaluations_without_gain) == (None, 0)


def test_target() -> None:
    progress = Progress()
    assert not progress.target_reached(0.5), "no evaluation yet"
    progress.take(result(0.5), None)
    assert progress.target_reached(0.5)
    assert not progress.target_reached(0.51)
    assert not progress.target_reached(None)


def test_json_keeps_every_counter() -> None:
    progress = Progress()
    progress.advance(7, 5)
    progress.next_epoch()
    progress.train_s = 1 / 3
    progress.corrupt.append("a.tar:0.jpg: truncated")
    progress.take(result(1 / 3, loss=2 / 7), EarlyStoppingConfig())
    assert Progress.from_numbers(json.loads(json.dumps(progress.to_numbers()))) == progress
