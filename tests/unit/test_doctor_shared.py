"""The run directory seen by the hosts of a job: shared, with locks that reach them all, and not another job's."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import pytest

from hpctrain.config.schema import Config
from hpctrain.doctor import shared
from hpctrain.doctor.job import Preflight, leave_findings, verdict
from hpctrain.doctor.shared import Sight, see_run_directory
from hpctrain.errors import MachineError, UserError
from hpctrain.train.rundir import RunDirectory
from tests.unit.fake_group import run_group

HOSTS = ["n0", "n0", "n1"]
CONFIG = Config.model_validate({"model": {"name": "dense"}})


def sights(run_dir: Path) -> list[Sight]:
    return run_group(3, lambda comm: see_run_directory(comm, run_dir, HOSTS[0]), HOSTS)


def stand_in(monkeypatch: pytest.MonkeyPatch, flock: Any) -> None:
    """Another flock for the doctor than the kernel's; run directories keep that."""
    monkeypatch.setattr(shared, "fcntl", SimpleNamespace(LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB, flock=flock))


def test_a_sound_folder_is_read_and_locked_once_and_left_as_it_was(tmp_path: Path) -> None:
    assert sights(tmp_path / "runs/new") == [Sight(reads=True, locks=False)] * 3
    assert list((tmp_path / "runs/new").iterdir()) == []


def test_locks_of_one_host_only_are_noticed_on_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, lambda stream, how: None)
    assert [sight.locks for sight in sights(tmp_path)] == [False, False, True]


def test_a_file_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(stream: IO[str], how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    stand_in(monkeypatch, refuse)
    with pytest.raises(UserError, match=r"has no locks \(Function not implemented\), .* \(Lustre: -o flock\), or take"):
        sights(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_no_mistake_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, mode: str, buffering: int) -> IO[bytes]:
        self.touch()
        return open("/dev/full", mode, buffering)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(MachineError, match=r"cannot write to the run directory .*/run: No space left on device$"):
        sights(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_directory_that_another_job_holds_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "_PATIENCE_S", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = RunDirectory(tmp_path / "run")
    run.open()
    (run.path / "preflight.json").write_text("of job 77")
    before = sorted(run.path.iterdir())
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(UserError, match=r"is in use by process \d+ on host \S+ of job 77; wait for that job or give"):
        sights(run.path)
    leave_findings(Preflight([], "mpi", "it is there"), CONFIG, run.path, None)
    assert (run.path / "preflight.json").read_text() == "of job 77"
    assert sorted(run.path.iterdir()) == before
    run.close()


def test_an_earlier_start_of_this_job_that_has_not_died_yet_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    run = RunDirectory(tmp_path / "run")
    run.open()
    assert sights(run.path) == [Sight(reads=True, locks=False)] * 3
    leave_findings(Preflight([], "mpi", "it is there"), CONFIG, run.path, None)
    assert json.loads((run.path / "preflight.json").read_text())["ok"] is True
    run.close()


def test_a_job_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open()
    threading.Timer(0.3, run.close).start()
    assert all(sight.reads for sight in sights(run.path))


def test_what_is_wrong_with_the_machine_is_no_mistake_of_the_user() -> None:
    """A job that is started again elsewhere may be rid of it; one with a mistake would make it again."""
    clock, pair = "the clock of host n1 is 3 s ahead", "ranks 0 and 1 share a GPU"
    found = Preflight([], "mpi", "it is there", faults=[clock])
    assert not found.to_record()["ok"]
    fault = verdict(found, CONFIG)
    assert isinstance(fault, MachineError) and str(fault) == clock
    found.complaints.append(pair)
    mistake = verdict(found, CONFIG)
    assert isinstance(mistake, UserError) and str(mistake) == f"{pair}\n{clock}"
    assert verdict(Preflight([], "mpi", "it is there"), CONFIG) is None
