"""The learning curve: a picture that opens, of bearable size, whatever the run was like."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpctrain.errors import MachineError
from hpctrain.metrics.picture import Pieces, draw_learning_curve, smoothed


def step_lines(count: int, steps_per_epoch: int = 10) -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    losses = 5 * np.exp(-np.arange(count) / count * 3) + generator.normal(0, 0.1, count)
    return [
        {"step": step, "epoch": step / steps_per_epoch, "loss": loss, "lr": 0.1}
        for step, loss in enumerate(losses.tolist(), start=1)
    ]


def eval_lines(count: int) -> list[dict[str, Any]]:
    return [{"epoch": float(epoch), "loss": 3.0 / epoch, "top1": 1 - 1 / (epoch + 1)} for epoch in range(1, count + 1)]


def assert_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.load()
        assert picture.format == "PNG"
        width, height = picture.size
        assert 1200 <= width <= 1600
        assert 800 <= height <= 1800
        colours = picture.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert len(colours) > 20, "an empty picture"
    assert path.stat().st_size < 400_000


UNKNOWN_STEP = {"step": 1, "epoch": 0.1, "loss": None, "lr": 0.1}
UNKNOWN_EVAL = {"epoch": 1.0, "loss": None, "top1": None}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("steps", "evals"),
    [
        pytest.param(step_lines(300), eval_lines(30), id="a run"),
        pytest.param(step_lines(3000), eval_lines(80), id="a long run"),
        pytest.param(step_lines(1), eval_lines(1), id="one point"),
        pytest.param(step_lines(50), [], id="no evaluation"),
        pytest.param([], [], id="nothing"),
        pytest.param([UNKNOWN_STEP], [UNKNOWN_EVAL], id="no finite figure"),
        pytest.param([*step_lines(50), {**UNKNOWN_STEP, "epoch": 5.1}], [*eval_lines(4), UNKNOWN_EVAL], id="gaps"),
    ],
)
def test_picture_of(tmp_path: Path, steps: list[dict[str, Any]], evals: list[dict[str, Any]]) -> None:
    path = tmp_path / "learning_curve.png"
    draw_learning_curve(path, steps, evals, "quickstart")
    assert_picture(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["learning_curve.png"]


def test_a_million_steps_are_drawn_in_seconds(tmp_path: Path) -> None:
    steps = step_lines(1_000_000, steps_per_epoch=5000)
    started = time.process_time()
    draw_learning_curve(tmp_path / "p.png", steps, eval_lines(200), "long")
    assert time.process_time() - started < 20
    assert_picture(tmp_path / "p.png")


def test_picture_that_cannot_be_written_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot write .*p\.png"):
        draw_learning_curve(tmp_path / "gone" / "p.png", step_lines(2), [], "x")


def test_pieces_keep_extremes_and_leave_out_gaps() -> None:
    y = np.arange(10_000.0)
    y[5000:5010] = np.nan
    y[7] = 1e6
    pieces = Pieces(np.arange(10_000.0), y)
    assert len(pieces.x) == 1000
    assert (pieces.x[0], pieces.low[0], pieces.high[0]) == (4.5, 0.0, 1e6)
    assert math.isnan(pieces.median[500])
    assert np.isfinite(np.delete(pieces.median, 500)).all()


def test_short_curve_is_not_cut() -> None:
    y = np.array([3.0, 1.0, 2.0])
    assert Pieces(y, y).median.tolist() == y.tolist()


def test_smoothing_ignores_a_spike_and_bridges_gaps() -> None:
    values = np.full(100, 2.0)
    values[[0, 40]] = np.inf, 900.0
    values[60:62] = np.nan, np.inf
    assert smoothed(values).tolist() == [2.0] * 100
    assert np.isnan(smoothed(np.full(3, np.nan))).all()
