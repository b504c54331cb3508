"""When a job's time is up, and when its last checkpoint must begin."""

from __future__ import annotations

import stat
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.launch.timelimit import TimeLimit, job_end_s, parse_end, stop_at_s

SECONDS = st.floats(0, 1e5)


@given(margin_s=SECONDS, write_s=SECONDS, turn_s=SECONDS)
def test_a_last_checkpoint_ends_in_time(margin_s: float, write_s: float, turn_s: float) -> None:
    """Asked at the latest moment: a poll, the turn under way, a peer's next one, the earlier write, the last write."""
    end_s = 1.8e9
    polls_s = 2.0
    written_s = stop_at_s(end_s, margin_s, write_s, turn_s) + polls_s + 2 * turn_s + write_s + write_s
    assert written_s <= end_s - margin_s


def test_what_is_left_follows_what_was_measured() -> None:
    writes = [0.0]
    limit = TimeLimit(time.time() + 100, 60, lambda: max(writes), lambda: 0.5)
    assert 30 < limit.left_s < 37
    writes.append(40.0)
    assert limit.left_s < 0


def test_slurm_tells_the_end_in_the_environment() -> None:
    later = int(time.time()) + 1000
    assert job_end_s({"SLURM_JOB_END_TIME": str(later), "SLURM_JOB_ID": "7"}) == later
    assert job_end_s({}) is None


def test_an_end_that_has_passed_is_of_another_job() -> None:
    assert job_end_s({"SLURM_JOB_END_TIME": str(int(time.time()) - 5), "PATH": ""}) is None


@pytest.mark.parametrize("text", ["NONE", "N/A", "Unknown", "", "UNLIMITED\n"])
def test_words_that_are_no_time(text: str) -> None:
    assert parse_end(text) is None


def squeue(folder: Path, script: str) -> dict[str, str]:
    """The environment of an old Slurm's job, whose `squeue` is ``script``."""
    program = folder / "squeue"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return {"SLURM_JOB_ID": "42", "PATH": f"{folder}:/usr/bin:/bin"}


def test_an_older_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = squeue(
        tmp_path, '[ "$2" = --jobs=42 ] && [ "$SLURM_TIME_FORMAT" = standard ] && echo 2099-01-02T03:04:05'
    )
    monkeypatch.setenv("PATH", environ["PATH"])
    assert job_end_s(environ) == time.mktime((2099, 1, 2, 3, 4, 5, 0, 0, -1))


def test_where_nobody_can_tell_there_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environ = squeue(tmp_path, "echo slurm_load_jobs error: Invalid job id >&2; exit 1")
    monkeypatch.setenv("PATH", environ["PATH"])
    assert job_end_s(environ) is None
    monkeypatch.setenv("PATH", "")
    assert job_end_s({"SLURM_JOB_ID": "42", "PATH": ""}) is None
