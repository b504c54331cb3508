"""TensorBoard scalars: what the page shows, before and after a resume."""

from __future__ import annotations

import builtins
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpctrain.errors import UserError
from hpctrain.metrics.steplog import EvalFigures, StepFigures
from hpctrain.metrics.tensorboard import TensorBoardLog

STEP = StepFigures(
    step=1, epoch=0.1, loss=2.5, lr=0.1, images_per_s=800.0, phases_s={"data": 0.25}, counters={"corrupt_skipped": 3}
)
EVAL = EvalFigures(step=2, epoch=1.0, loss=1.5, top1=0.5, top5=0.75, seen=10, seconds=1.0)


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each scalar, as TensorBoard itself would show them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in tags}


def test_steps_and_evaluations_become_scalars(tmp_path: Path) -> None:
    log = TensorBoardLog(tmp_path)
    log.step(STEP)
    log.evaluation(EVAL)
    log.close()
    scalars = read_scalars(tmp_path)
    assert scalars.pop("train/lr") == [(1, pytest.approx(0.1))]
    assert scalars == {
        "train/loss": [(1, 2.5)], "train/images_per_s": [(1, 800.0)], "train/corrupt_skipped": [(1, 3.0)],
        "phases_s/data": [(1, 0.25)], "val/loss": [(2, 1.5)], "val/top1": [(2, 0.5)], "val/top5": [(2, 0.75)],
    }  # fmt: skip


def test_curves_do_not_double_after_a_resume(tmp_path: Path) -> None:
    for resumed_step, last_step in [(0, 20), (10, 15)]:
        log = TensorBoardLog(tmp_path, resumed_step)
        for step in range(resumed_step + 1, last_step + 1):
            log.step(replace(STEP, step=step, loss=float(step + resumed_step)))
        log.close()
    expected = [(step, float(step)) for step in range(1, 11)] + [(step, step + 10.0) for step in range(11, 16)]
    assert read_scalars(tmp_path)["train/loss"] == expected


def test_missing_package_is_the_users_to_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError("No module named 'tensorboard'")
        return real_import(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        UserError, match=r"tensorboard cannot be imported .*; install tensorboard or set log\.tensorboard"
    ):
        TensorBoardLog(tmp_path)
