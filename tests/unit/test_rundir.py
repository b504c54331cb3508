"""The run directory: one job at a time, and errors a person can act on."""

from __future__ import annotations

import errno
import gc
import os
import re
import socket
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest

from hpctrain.errors import MachineError, UserError
from hpctrain.train.main import open_run
from hpctrain.train.rundir import RunDirectory, default_run_dir, held_by_another
from tests.unit.fake_group import FakeCommunicator, run_group


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
    assert not second.open(earlier_start_s=60)
    first.close()
    assert second.open(earlier_start_s=60)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on host \S+ of job 77; wait for that job"):
        first.open(earlier_start_s=60)
    second.close()


def test_the_tasks_of_an_array_are_one_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a SLURM_JOB_ID of its own; the last one's rank 0 may still live on a node that was cut off."""
    monkeypatch.setattr("hpctrain.train.rundir._PATIENCE_S", 0.0)
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first.open()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    assert held_by_another(first.path) is None
    assert not second.open(earlier_start_s=60)
    first.close()
    assert second.open(earlier_start_s=60)
    second.close()


def test_ranks_show_signs_of_life_however_long_an_earlier_start_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With comm.timeout_s = 600 that may be longer than all that a start has for its first step."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    earlier = RunDirectory(tmp_path / "run")
    earlier.open()
    now_s = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s > 620:
            earlier.close()

    monkeypatch.setattr("hpctrain.train.rundir.time", SimpleNamespace(monotonic=lambda: now_s, sleep=sleep))
    beats: list[list[float]] = [[], []]

    def rank(comm: FakeCommunicator) -> None:
        comm.arrive = lambda: beats[comm.rank].append(now_s)
        open_run(comm, earlier.path, 630.0).close()

    run_group(2, rank)
    for moments in beats:
        assert moments[-1] > 620
        assert max(later - before for before, later in pairwise([0.0, *moments])) < 5


def test_an_earlier_start_is_waited_for_no_longer_than_it_may_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.open()
    moments = iter([0.0, 89.0, 91.0])
    monkeypatch.setattr(
        "hpctrain.train.rundir.time", SimpleNamespace(monotonic=lambda: next(moments), sleep=lambda seconds: None)
    )
    assert not second.open(90.0)
    assert not second.open(90.0)
    locked = (
        rf"run directory \S+/run is still locked by an earlier start of this job, process {os.getpid()} on host \S+ of "
        "job 77: see that its process or node is gone"
    )
    with pytest.raises(MachineError, match=locked):
        second.open(90.0)
    first.close()


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


@pytest.mark.parametrize("refuses", ["pathlib.Path.mkdir", "os.write"])
def test_full_disk_is_the_machines_fault(refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(refuses, refuse)
    with pytest.raises(MachineError, match="No space left on device"):
        RunDirectory(tmp_path / "run").open()


@pytest.mark.parametrize(
    ("number", "kind", "sentence"),
    [
        (errno.EIO, MachineError, r"cannot lock the run directory \S+/run: Input/output error"),
        *(
            (
                number,
                UserError,
                r"the file system of the run directory \S+/run has no locks \(.+\), which keep a second job out: have "
                r"it mounted with them \(Lustre: -o flock\), or take another one \(HPCTRAIN_RUNS, or --run-dir\)",
            )
            for number in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
        ),
    ],
)
def test_locking_that_fails_is_said(
    number: int, kind: type[Exception], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(kind) as caught:
        RunDirectory(tmp_path / "run").open()
    assert re.fullmatch(sentence, str(caught.value))


def test_default_name_tells_config_and_time() -> None:
    assert default_run_dir("quickstart").name.startswith("quickstart-20")


def test_a_job_that_is_just_ending_is_waited_for(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    first.open()
    assert not second.open()
    first.close()
    assert second.open()
    second.close()


def test_a_lock_that_is_kept_outlasts_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.train.rundir._PATIENCE_S", 0.0)
    run = RunDirectory(tmp_path / "run")
    run.open()
    run.keep_locked()
    run.close()
    del run
    gc.collect()
    with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"):
        RunDirectory(tmp_path / "run").open()
