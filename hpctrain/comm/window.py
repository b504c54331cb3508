"""Memory that the ranks of one host share, without a file that could outlive them.

Each rank makes an anonymous file (memfd_create) and maps it; the others map it too, by way of
``/proc/PID/fd/N``. It is gone with the last process that maps it, whatever ends that. Nothing here copies or sums.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import threading
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import psutil
import torch

from hpctrain.comm.base import Communicator, NoWindow, Window
from hpctrain.errors import MachineError

#: Stores reach the other cores in the order of the program (Intel SDM, volume 3A, "Memory Ordering"); the streaming
#: stores of a large copy end with a fence of their own.
_STORES_IN_ORDER = platform.machine() == "x86_64"
_COUNTER_BYTES = 8
_SPIN_S = 50e-6
_FIRST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 200e-6
_LIFE_CHECK_S = 1.0


def open_window(comm: Communicator, nbytes: int) -> Window | NoWindow:
    """A window of ``nbytes`` a rank over the ranks of ``comm``, or why there is none, the same on all. Collective.

    Raises ValueError when ranks ask for different sizes.
    """
    refusal = _first(comm, _unfit(comm, nbytes))
    if refusal:
        return NoWindow(refusal)
    file = None
    try:
        file = _File.create(nbytes)
    except OSError as error:
        refusal = f"rank {comm.rank} gets no memory to share: {error}"
    offers = comm.all_gather_object([os.getpid(), *file] if file else None)
    parts: list[_Part] = []
    if file and None not in offers:
        try:
            for rank, (process, descriptor, name) in enumerate(offers):
                is_mine = rank == comm.rank
                parts.append(_Part(_File(descriptor, name), process, nbytes, is_mine=is_mine))
        except (OSError, psutil.Error) as error:
            refusal = f"rank {comm.rank} cannot see the memory of rank {len(parts)}: {error}"
    refusal = _first(comm, refusal)
    if file:
        # All ranks have mapped it by now.
        os.close(file.descriptor)
    return NoWindow(refusal) if refusal else SharedWindow(comm.rank, comm.topology.host, parts)


def _unfit(comm: Communicator, nbytes: int) -> str:
    """Why these ranks cannot share memory at all, or nothing."""
    hosts, devices, sizes = (
        set(column)
        for column in zip(*comm.all_gather_object([comm.topology.host, comm.device.type, nbytes]), strict=True)
    )
    if len(sizes) > 1:
        raise ValueError(f"a window has one size on all ranks, not {sorted(sizes)} bytes")
    if devices != {"cpu"}:
        return "the buffers lie on a GPU"
    if len(hosts) > 1:
        return f"the ranks sit on {len(hosts)} hosts"
    if not hasattr(os, "memfd_create"):
        return f"{platform.system()} has no anonymous files"
    # Linux promises more memory than there is, and ends a process when that comes out.
    free = psutil.virtual_memory().available
    if comm.world_size * nbytes > free:
        return f"{comm.world_size} times {nbytes >> 20} MiB do not fit in the {free >> 20} MiB of memory that are free"
    return ""


def _first(comm: Communicator, refusal: str) -> str:
    """The refusal of the lowest rank that has one, on every rank."""
    return next(filter(None, comm.all_gather_object(refusal)), "")


class _File(NamedTuple):
    """An anonymous file: this process's number for it, and a name that no other file has."""

    descriptor: int
    name: str

    @classmethod
    def create(cls, nbytes: int) -> _File:
        """A file for ``nbytes`` and the counter, its memory allocated now: later it would be missed by a signal."""
        file = cls(os.memfd_create(name := f"hpctrain-{secrets.token_hex(16)}", os.MFD_CLOEXEC), name)
        try:
            os.posix_fallocate(file.descriptor, 0, _counter_at(nbytes) + _COUNTER_BYTES)
        except OSError:
            os.close(file.descriptor)
            raise
        return file


class _Part:
    """One rank's memory as this process maps it: ``data`` uint8 [nbytes], ``counter`` int64 [1], ``process``.

    The mapping lasts as long as a tensor or a counter on it.
    """

    def __init__(self, file: _File, process: int, nbytes: int, *, is_mine: bool) -> None:
        """Raises OSError where the other process's file is not to be seen, psutil.Error where the process is not."""
        self.process = psutil.Process(process)
        path = f"/proc/{process}/fd/{file.descriptor}"
        # Of another process of that number, as in a container of its own, nothing is opened.
        if file.name not in os.readlink(path):
            raise OSError(f"{path} is another file")
        counter_at = _counter_at(nbytes)
        with open(path, "r+b" if is_mine else "rb", buffering=0) as opened:
            protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_mine else 0)
            # Populated: the pages are entered in the page table here, not one by one during the first step.
            flags = mmap.MAP_SHARED | mmap.MAP_POPULATE
            memory = mmap.mmap(opened.fileno(), counter_at + _COUNTER_BYTES, flags, protection)
        with warnings.catch_warnings():
            # Torch has no tensors that are only read: to write one of the others' ends this process.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            self.data = torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]
        self.counter = memoryview(memory)[counter_at:].cast("q")

    def is_alive(self) -> bool:
        try:
            return self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False


def _counter_at(nbytes: int) -> int:
    """Where the counter lies behind ``nbytes`` of data: on a page, and so in a cache line, of its own."""
    return -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE


class SharedWindow(Window):
    """The window of ``parts``, one a rank in rank order; used by one thread at a time."""

    def __init__(self, rank: int, host: str, parts: Sequence[_Part]) -> None:
        self.parts = [part.data for part in parts]
        self.posted = 0
        self._rank, self._host, self._ranks = rank, host, list(parts)

    def post(self) -> None:
        if not _STORES_IN_ORDER:
            fence()
        self.posted += 1
        # One aligned store of eight bytes: nobody sees half of it.
        self._ranks[self._rank].counter[0] = self.posted

    def reached(self, count: int) -> bool:
        there = all(part.counter[0] >= count for part in self._ranks)
        if there and not _STORES_IN_ORDER:
            fence()
        return there

    def wait(self, count: int) -> None:
        now = time.monotonic()
        spin_until, look_at, sleep_s = now + _SPIN_S, now + _LIFE_CHECK_S, _FIRST_SLEEP_S
        for part in self._ranks:
            while part.counter[0] < count:
                now = time.monotonic()
                if now < spin_until:
                    os.sched_yield()
                    continue
                if now > look_at:
                    self._require_alive(count)
                    look_at = now + _LIFE_CHECK_S
                time.sleep(sleep_s)
                sleep_s = min(2 * sleep_s, _LONGEST_SLEEP_S)
        if not _STORES_IN_ORDER:
            fence()

    def _require_alive(self, count: int) -> None:
        for rank, part in enumerate(self._ranks):
            # In this order: a process may post and end in between.
            if not part.is_alive() and part.counter[0] < count:
                raise MachineError(
                    f"rank {rank} (host {self._host}) is gone: its process {part.process.pid} ended while the others "
                    "waited for what it was to write"
                )

    def close(self) -> None:
        self.parts = []
        self._ranks = []


_lock = threading.Lock()


def fence() -> None:
    """Keep what memory is read and written before this apart from what is after it, where a machine mixes them.

    A lock lets accesses drift in from both sides, but not past its far edge: giving it back and taking it again
    stand between the two sides.
    """
    for _ in range(2):
        with _lock:
            pass
