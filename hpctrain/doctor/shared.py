"""The run directory as the hosts of a job see it: free, shared, and with locks that reach from host to host.

What is told of it, and with which remedy, is for ``judge``, where it takes more than one host to know.
"""

from __future__ import annotations

import fcntl
import time
import uuid
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.train.rundir import cannot_lock, cannot_write, held_by_another, in_use

#: A file that was written elsewhere may take a network file system so long to show, and a job so long to end.
_PATIENCE_S = 5.0
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Sight:
    """What a rank sees of rank 0's file: whether it ``reads`` it, and whether it ``locks`` it, though rank 0 does."""

    reads: bool
    locks: bool


def see_run_directory(comm: Communicator, run_dir: Path, first_host: str) -> Sight:
    """This rank's sight of a file that rank 0, on ``first_host``, makes and locks in ``run_dir`` for now. Collective.

    Raises UserError, on all ranks, where another job trains there or rank 0 may neither write nor lock, MachineError
    where the disk is full.
    """
    with ExitStack() as held:
        path = run_dir / on_rank_zero(comm, lambda: _make_token(run_dir, held))
        deadline = time.monotonic() + _PATIENCE_S
        while not (reads := _reads(path)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        sight = Sight(reads, locks=reads and comm.topology.host != first_host and _locks(path))
        comm.barrier()
        if comm.rank == 0:
            path.unlink(missing_ok=True)
    return sight


def _make_token(run_dir: Path, held: ExitStack) -> str:
    """Write a file in ``run_dir`` and lock it as long as ``held`` lasts; its name, which is its content."""
    deadline = time.monotonic() + _PATIENCE_S
    while (holder := held_by_another(run_dir)) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    if holder:
        raise in_use(run_dir, holder)
    name = f".preflight-{uuid.uuid4().hex}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # Without a buffer, which closing it would try to write once more.
        token = held.enter_context((run_dir / name).open("wb", buffering=0))
        token.write(name.encode())
    except OSError as error:
        with suppress(OSError):
            (run_dir / name).unlink()
        raise cannot_write(run_dir, error) from error
    try:
        fcntl.flock(token, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        (run_dir / name).unlink()
        raise cannot_lock(run_dir, error) from error
    return name


def _reads(path: Path) -> bool:
    try:
        return path.read_text() == path.name
    except OSError:
        return False


def _locks(path: Path) -> bool:
    try:
        with path.open("r+") as token:
            fcntl.flock(token, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
