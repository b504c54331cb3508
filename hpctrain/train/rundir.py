"""The run directory: one folder per run, held by one job at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.layout import CHECKPOINTS, CONFIG_FILE, RECORD_FILE

_LOCK_NAME = ".lock"
#: A job that was stopped may take this long to die, after its launcher has ended and the next one begun.
_PATIENCE_S = 5.0


def default_run_dir(name: str) -> Path:
    """``runs/<config>-<time>`` below the working directory, with the local time to the second."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


class RunDirectory:
    """Paths of one run, and the lock that keeps a second job out of it.

    Only rank 0 opens it for writing; the lock is the kernel's and goes with the process, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: IO[str] | None = None

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def steps(self) -> Path:
        return self.path / "steps.jsonl"

    @property
    def evals(self) -> Path:
        return self.path / "evals.jsonl"

    @property
    def record(self) -> Path:
        return self.path / RECORD_FILE

    @property
    def picture(self) -> Path:
        return self.path / "learning-curve.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def open(self, earlier_start_s: float = _PATIENCE_S) -> None:
        """Make the folder and take its lock; an earlier start of this Slurm job may take ``earlier_start_s`` to die.

        Slurm starts a job again while ranks of its last start may still be alive, on a node that it cannot reach: these
        end when they have waited for their peers for long enough.

        Raises UserError when it cannot be written to or another job holds it, MachineError when the disk is full.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / _LOCK_NAME, "a+")  # noqa: SIM115 - held until close()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            _lock_patiently(lock, _of_this_job(), earlier_start_s)
        except BlockingIOError as error:
            holder = _holder(lock)
            lock.close()
            raise in_use(self.path, holder) from error
        except OSError as error:
            lock.close()
            raise MachineError(f"cannot lock the run directory {self.path}: {error.strerror}") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on host {socket.gethostname()}{_of_this_job()}\n")
        lock.flush()
        self._lock = lock

    def forget_record(self) -> None:
        """Remove the record of an earlier end, since the run goes on."""
        self.record.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def held_by_another(path: Path) -> str | None:
    """Who trains in the run directory ``path``, or None; an earlier start of this Slurm job does not count.

    Nothing is waited for, made or written. Where there is no file to lock, or no locks, nobody holds it.
    """
    with suppress(OSError), open(path / _LOCK_NAME) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder, of_this_job = _holder(lock), _of_this_job()
            return None if of_this_job and holder.endswith(of_this_job) else holder
    return None


def in_use(path: Path, holder: str) -> UserError:
    """What a second job on the run directory ``path`` is told."""
    return UserError(f"run directory {path} is in use by {holder}; wait for that job or give another --run-dir")


def _of_this_job() -> str:
    """How the Slurm job around this process is told in the lock, nothing outside of one."""
    job = os.environ.get("SLURM_JOB_ID")
    return f" of job {job}" if job else ""


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "an unknown process"


def _lock_patiently(lock: IO[str], of_this_job: str, earlier_start_s: float) -> None:
    """Take the lock; raises BlockingIOError when the holder's time has come to an end and it is still held."""
    began = time.monotonic()
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            is_earlier_start = of_this_job and _holder(lock).endswith(of_this_job)
            if time.monotonic() - began >= (earlier_start_s if is_earlier_start else _PATIENCE_S):
                raise
            time.sleep(0.2)


def _cannot_write(path: Path, error: OSError) -> UserError | MachineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"cannot create the run directory {path}: {error.strerror}")
    reason = (error.strerror or str(error)).lower()
    return UserError(f"cannot write to the run directory {path} ({reason}); give a writable one with --run-dir")
