"""The run directory: one folder per run, held by one job at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.record import CONFIG_FILE, RECORD_FILE

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
        return self.path / "checkpoints"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def open(self) -> None:
        """Make the folder and take its lock.

        Raises UserError when it cannot be written to or another job holds it, MachineError when the disk is full.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / _LOCK_NAME, "a+")  # noqa: SIM115 - held until close()
        except OSError as error:
            raise _cannot_write(self.path, error) from error
        try:
            _lock_patiently(lock)
        except BlockingIOError as error:
            lock.seek(0)
            holder = lock.read().strip() or "an unknown process"
            lock.close()
            raise UserError(
                f"run directory {self.path} is in use by {holder}; wait for that job or give another --run-dir"
            ) from error
        except OSError as error:
            lock.close()
            raise MachineError(f"cannot lock the run directory {self.path}: {error.strerror}") from error
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on host {socket.gethostname()}\n")
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


def _lock_patiently(lock: IO[str]) -> None:
    """Take the lock; raises BlockingIOError when it is still held after ``_PATIENCE_S``."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.2)


def _cannot_write(path: Path, error: OSError) -> UserError | MachineError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"cannot create the run directory {path}: {error.strerror}")
    reason = (error.strerror or str(error)).lower()
    return UserError(f"cannot write to the run directory {path} ({reason}); give a writable one with --run-dir")
