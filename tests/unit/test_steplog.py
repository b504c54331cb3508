"""The log of steps and evaluations: kills, resumes, torn lines, figures that are not numbers."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.jsonfiles import read_log, read_log_if_any
from hpctrain.metrics.steplog import EvalFigures, StepFigures, StepLog

STEP = StepFigures(
    step=1, epoch=0.5, loss=2.25, lr=0.1, images_per_s=812.5, phases_s={"data": 0.01}, counters={"corrupt_skipped": 2}
)
EVAL = EvalFigures(step=1, epoch=1.0, loss=1.5, top1=0.7, top5=0.9, seen=50_001, seconds=3.0)
STABLE_KEYS = ["step", "epoch", "loss", "lr", "images_per_s", "phases_s"]


def write_run(folder: Path, last_step: int, resumed_step: int = 0) -> None:
    log = StepLog(folder, resumed_step)
    for step in range(resumed_step + 1, last_step + 1):
        log.step(replace(STEP, step=step, loss=float(step)))
        if step % 5 == 0:
            log.evaluation(replace(EVAL, step=step))
    log.close()


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_log(folder / "steps.jsonl")]


def test_lines_have_the_stable_keys_then_the_counters(tmp_path: Path) -> None:
    write_run(tmp_path, 5)
    line = read_log_if_any(tmp_path / "steps.jsonl")[0]
    assert list(line) == [*STABLE_KEYS, "corrupt_skipped"]
    assert line["phases_s"] == {"data": 0.01}
    (evaluation,) = read_log(tmp_path / "evals.jsonl")
    assert evaluation == {
        "step": 5, "epoch": 1.0, "loss": 1.5, "top1": 0.7, "top5": 0.9, "seen": 50_001, "seconds": 3.0,
    }  # fmt: skip


def test_figures_that_are_not_numbers_are_null(tmp_path: Path) -> None:
    log = StepLog(tmp_path)
    log.step(replace(STEP, loss=float("nan"), images_per_s=float("inf"), phases_s={"data": float("nan")}))
    log.close()
    assert "NaN" not in (tmp_path / "steps.jsonl").read_text()
    (line,) = read_log(tmp_path / "steps.jsonl")
    assert (line["loss"], line["images_per_s"], line["phases_s"]) == (None, None, {"data": None})


def test_counter_cannot_hide_a_stable_key() -> None:
    with pytest.raises(AssertionError, match="stable key"):
        replace(STEP, counters={"loss": 1.0}).to_line()


def test_resume_drops_the_lines_of_later_steps(tmp_path: Path) -> None:
    write_run(tmp_path, 20)
    write_run(tmp_path, 14, resumed_step=12)
    assert steps_of(tmp_path) == list(range(1, 15))
    assert [line["step"] for line in read_log(tmp_path / "evals.jsonl")] == [5, 10]


def test_fresh_run_starts_with_empty_files(tmp_path: Path) -> None:
    write_run(tmp_path, 3)
    StepLog(tmp_path).close()
    assert steps_of(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 2, 30, 90])
def test_torn_last_line_is_no_obstacle(tmp_path: Path, cut: int) -> None:
    write_run(tmp_path, 4)
    path = tmp_path / "steps.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    assert steps_of(tmp_path) == [1, 2, 3]
    write_run(tmp_path, 6, resumed_step=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert path.read_bytes().endswith(b"\n")


def test_kill_loses_no_logged_line(tmp_path: Path) -> None:
    program = (
        "import sys, os, signal; from dataclasses import replace; from pathlib import Path\n"
        "from tests.unit.test_steplog import STEP; from hpctrain.metrics.steplog import StepLog\n"
        "log = StepLog(Path(sys.argv[1]))\n"
        "for step in range(1, 101): log.step(replace(STEP, step=step))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert steps_of(tmp_path) == list(range(1, 101))


def test_failed_truncation_keeps_the_old_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path, 10)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hpctrain.metrics.jsonfiles.os.replace", fail)
    with pytest.raises(MachineError, match=r"cannot write .*steps\.jsonl"):
        StepLog(tmp_path, resumed_step=5)
    assert steps_of(tmp_path) == list(range(1, 11))


def test_unwritable_log_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot write .*steps\.jsonl: No such file or directory"):
        StepLog(tmp_path / "gone")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_full_disk_is_a_machine_error(tmp_path: Path) -> None:
    log = StepLog(tmp_path)
    log.close()
    (tmp_path / "steps.jsonl").unlink()
    os.symlink("/dev/full", tmp_path / "steps.jsonl")
    log._steps = open(tmp_path / "steps.jsonl", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(MachineError, match=r"cannot write .*steps\.jsonl: No space left on device"):
        log.step(STEP)
    log.close()


def test_line_that_the_system_takes_in_two_parts_is_whole(tmp_path: Path) -> None:
    class Hesitant(io.FileIO):
        def write(self, content: Any) -> int:
            return super().write(content[: max(20, len(content) // 2)])

    log = StepLog(tmp_path)
    log._steps.close()
    log._steps = Hesitant(tmp_path / "steps.jsonl", "a")
    log.step(STEP)
    log.close()
    assert steps_of(tmp_path) == [1]


def test_missing_log_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"steps\.jsonl cannot be read \(No such .*; name the folder of a run"):
        list(read_log(tmp_path / "steps.jsonl"))


@pytest.mark.parametrize("damaged", ['{"step": ', "[2]"])
def test_a_damaged_line_is_named(tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
    with pytest.raises(UserError, match=r"line 2 of .*steps\.jsonl is damaged; restore .* from a copy, or delete that"):
        StepLog(tmp_path, 3)


def test_every_line_is_json_by_itself(tmp_path: Path) -> None:
    write_run(tmp_path, 7)
    rows = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert [json.loads(row)["loss"] for row in rows] == [float(step) for step in range(1, 8)]
