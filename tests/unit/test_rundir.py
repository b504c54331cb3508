"""The run directory: one job at a time, and errors a person can act on."""

from __future__ import annotations

import errno
import os
import socket
import threading
from pathlib import Path

import pytest

from hpctrain.errors import MachineError, UserError
from hpctrain.train.rundir import RunDirectory, default_run_dir, held_by_another


def test_second_job_is_refused_until_the_first_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.train.rundir._PATIENCE_S", 0.0)
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.open()
    with pytest.raises(UserError, match=rf"is in use by process {os.getpid()} on host .*; wait for that job or give"):
        second.open()
    first.close()
    second.open()
    second.close()


def test_an_earlier_start_of_the_same_job_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off from Slurm and from its peers, it has not yet given up."""
    monkeypatch.setattr("hpctrain.train.rundir._PATIENCE_S", 0.0)
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first.open()
    threading.Timer(0.5, first.close).start()
    second.open(earlier_start_s=60)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on host \S+ of job 77; wait for that job"):
        first.open(earlier_start_s=60)
    second.close()


def test_who_trains_in_a_run_directory_can_be_asked_without_touching_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = RunDirectory(tmp_path / "run")
    assert held_by_another(run.path) is None and not run.path.exists()
    run.open()
    assert held_by_another(run.path) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    holder = f"process {os.getpid()} on host {socket.gethostname()} of job 77"
    assert held_by_another(run.path) == holder == (run.path / ".lock").read_text().strip()
    run.close()
    assert held_by_another(run.path) is None


def test_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the run directory .* give a writable one with --run-dir"):
        RunDirectory(tmp_path / "file" / "run").open()


def test_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match="read-only file system"):
        RunDirectory(tmp_path / "run").open()


def test_full_disk_is_the_machines_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(MachineError, match="No space left on device"):
        RunDirectory(tmp_path / "run").open()


def test_locking_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(MachineError, match="cannot lock the run directory"):
        RunDirectory(tmp_path / "run").open()


def test_default_name_tells_config_and_time() -> None:
    assert default_run_dir("quickstart").name.startswith("quickstart-20")


def test_a_job_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.open()
    threading.Timer(0.5, first.close).start()
    second.open()
    second.close()
