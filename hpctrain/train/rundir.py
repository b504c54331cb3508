"""The run directory: one folder per run, held by one job at a time."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.layout import CHECKPOINTS, CONFIG_FILE, EVALS_FILE, PICTURE_FILE, RECORD_FILE, STEPS_FILE

_LOCK_NAME = ".lock"
#: A job that was stopped may take this long to die, after its launcher has ended and the next one begun.
_PATIENCE_S = 5.0
_LOOK_S = 0.5
#: what flock says where a file system is mounted without locks, or its lock server is not there
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def default_run_dir(name: str) -> Path:
    """``runs/<config>-<time>`` below the working directory, with the local time to the second."""
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


class RunDirectory:
    """Paths of one run, and the lock that keeps a second job out of it.

    Only rank 0 opens it for writing; the lock is the kernel's and goes with the process, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None
        self._asked_s: float | None = None

    @property
    def config(self) -> Path:
        return self.path / CONFIG_FILE

    @property
    def steps(self) -> Path:
        return self.path / STEPS_FILE

    @property
    def evals(self) -> Path:
        return self.path / EVALS_FILE

    @property
    def record(self) -> Path:
        return self.path / RECORD_FILE

    @property
    def picture(self) -> Path:
        return self.path / PICTURE_FILE

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    def open(self, earlier_start_s: float = _PATIENCE_S) -> bool:
        """Make the folder and take its lock; False, half a second later, where its holder may still go: call it again.

        Slurm starts a job again while ranks of its last start may still be alive, on a node that it cannot reach: these
        end when they have waited for their peers for long enough, within ``earlier_start_s`` from the first call.

        Raises UserError when it cannot be written to or locked or another job holds it, MachineError when the disk is
        full or the last start of this job still holds it.
        """
        now_s = time.monotonic()
        if self._asked_s is None:
            self._asked_s = now_s
        path = self.path / _LOCK_NAME
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock = _try_lock(path)
            if self._lock is not None:
                os.ftruncate(self._lock, 0)
                os.write(self._lock, f"process {os.getpid()} on host {socket.gethostname()}{_of_this_job()}\n".encode())
                return True
        except OSError as error:
            raise cannot_write(self.path, error) from error
        holder = _holder(path)
        ours = _is_of_this_job(holder)
        if now_s - self._asked_s >= (earlier_start_s if ours else _PATIENCE_S):
            raise _still_locked(self.path, holder) if ours else in_use(self.path, holder)
        time.sleep(_LOOK_S)
        return False

    def forget_record(self) -> None:
        """Remove the record of an earlier end, since the run goes on."""
        self.record.unlink(missing_ok=True)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def keep_locked(self) -> None:
        """Leave the lock to the kernel, which gives it back when this process ends."""
        self._lock = None


def held_by_another(path: Path) -> str | None:
    """Who trains in the run directory ``path``, or None; an earlier start of this Slurm job does not count.

    Nothing is waited for, made or written. Where there is no file to lock, or no locks, nobody holds it.
    """
    with suppress(OSError), open(path / _LOCK_NAME) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _holder(path / _LOCK_NAME)
            return None if _is_of_this_job(holder) else holder
    return None


def in_use(path: Path, holder: str) -> UserError:
    """What a second job on the run directory ``path`` is told."""
    return UserError(f"run directory {path} is in use by {holder}; wait for that job or give another --run-dir")


def _still_locked(path: Path, holder: str) -> MachineError:
    # Not the user's fault: it must leave `hpctrain requeue` the choice to start again, on other nodes.
    return MachineError(
        f"run directory {path} is still locked by an earlier start of this job, {holder}: "
        "see that its process or node is gone"
    )


def cannot_lock(path: Path, error: OSError) -> UserError | MachineError:
    """What is said where the run directory ``path`` cannot be locked, most often by a file system that has no locks."""
    if error.errno not in _WITHOUT_LOCKS:
        return MachineError(f"cannot lock the run directory {path}: {error.strerror}")
    return UserError(
        f"the file system of the run directory {path} has no locks ({error.strerror}), which keep a second job "
        "out: have it mounted with them (Lustre: -o flock), or take another one (HPCTRAIN_RUNS, or --run-dir)"
    )


def _of_this_job() -> str:
    """How the Slurm job around this process is told in the lock, the tasks of an array being one job; nothing outside
    of one."""
    job = os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")
    return f" of job {job}" if job else ""


def _is_of_this_job(holder: str) -> bool:
    of_this_job = _of_this_job()
    return bool(of_this_job) and holder.endswith(of_this_job)


def _holder(path: Path) -> str:
    return path.read_text().strip() or "an unknown process"


def _try_lock(path: Path) -> int | None:
    """A descriptor of the file ``path`` that locks it until it is closed, or None where another process does.

    It is a plain number so that nothing else closes it, however the program fails.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise cannot_lock(path.parent, error) from error
    return descriptor


def cannot_write(path: Path, error: OSError) -> UserError | MachineError:
    """What is said where the run directory ``path`` cannot be made or written to."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"cannot write to the run directory {path}: {error.strerror}")
    reason = (error.strerror or str(error)).lower()
    return UserError(f"cannot write to the run directory {path} ({reason}); give a writable one with --run-dir")
