"""Heartbeats and last words beside every engine, over a TCP store that rank 0 serves.

A collective that blocks cannot say who is late, and a rank that died cannot say why; this channel can, since its
server's thread and its clients need neither the engine nor the interpreter lock of the blocked thread. It carries
a few hundred bytes a second and rank, and all heartbeats to a rank that has waited past its limit while rank 0 found
nobody late; ``hpctrain.comm.watch`` decides what they mean.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from hpctrain.comm.base import Communicator
from hpctrain.errors import MachineError
from hpctrain.topology.phases import PHASES, Phase

_CONNECT_TIMEOUT_S = 30.0
_TRY_TIMEOUT_S = 3.0
_CLAIM, _WORDS, _ACKS, _LEFT = "claim", "words", "acks", "left"
_PROPOSAL, _PROMISES, _LAST_TURN = "proposal", "promises", "last-turn"


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Where a rank stood when it last wrote: ``count`` grows with each writing, ``ticks`` with each sign of life in
    one phase, ``age_s`` is the time since the main thread last moved on."""

    rank: int
    host: str
    step: int
    phase: Phase
    ticks: int
    age_s: float
    count: int


@dataclass(frozen=True, slots=True)
class LastWords:
    """Why a job ends, in one line of the rank that found out first, and the exit status for all.

    ``kind`` is "error", "late" (no progress, for which the ranks ``late`` are accused) or "told" (printed in full by
    that rank, no news to the others).
    """

    rank: int
    host: str
    step: int
    phase: str
    kind: str
    summary: str
    code: int
    late: tuple[int, ...] = ()


class SideChannel:
    """One rank's client of the store; for a job of one rank there is none, and nobody to call.

    Every call may block while rank 0's host hangs, and raises RuntimeError when the server is gone: only ``Watch``
    and ``Turns`` call them, from threads that may.
    """

    def __init__(self, store: Any, rank: int, world_size: int, server_host: str) -> None:
        self._store = store
        self.rank, self.world_size, self.server_host = rank, world_size, server_host

    @classmethod
    def open(cls, comm: Communicator) -> SideChannel:
        """Serve on rank 0, connect from all. Collective. Raises MachineError where rank 0 cannot be reached."""
        from hpctrain.comm.torch_engine import open_store

        if comm.world_size == 1:
            return cls(None, 0, 1, comm.topology.host)
        server = None
        if comm.rank == 0:
            server = open_store("127.0.0.1", 0, serve=True, timeout_s=_CONNECT_TIMEOUT_S)
        addresses = _own_addresses(several_hosts=comm.topology.num_nodes > 1)
        offer = server and {"addresses": addresses, "port": server.port, "host": comm.topology.host}
        offer = comm.broadcast_object(offer)
        store = server
        if store is None:
            address = _reachable(offer["addresses"], offer["port"], comm)
            store = open_store(address, offer["port"], serve=False, timeout_s=_CONNECT_TIMEOUT_S)
        channel = cls(store, comm.rank, comm.world_size, offer["host"])
        channel.beat(Heartbeat(comm.rank, comm.topology.host, 0, PHASES[0], 0, 0.0, 0))
        comm.barrier()
        return channel

    def beat(self, heartbeat: Heartbeat) -> None:
        self._store.set(f"beat/{self.rank}", json.dumps(asdict(heartbeat)))

    def heartbeat(self, rank: int) -> Heartbeat:
        """The latest of ``rank``."""
        return Heartbeat(**json.loads(self._store.get(f"beat/{rank}")))

    def heartbeats(self) -> list[Heartbeat]:
        """The latest of every rank, in rank order."""
        found = self._store.multi_get([f"beat/{rank}" for rank in range(self.world_size)])
        return [Heartbeat(**json.loads(text)) for text in found]

    def claim(self) -> bool:
        """True on the one rank that may write the last words."""
        return int(self._store.compare_set(_CLAIM, "", str(self.rank))) == self.rank

    def write_last_words(self, words: LastWords) -> None:
        self._store.set(_WORDS, json.dumps(asdict(words)))

    def last_words(self) -> LastWords | None:
        if not self._store.check([_WORDS]):
            return None
        words = json.loads(self._store.get(_WORDS))
        return LastWords(**{**words, "late": tuple(words["late"])})

    def acknowledge(self) -> None:
        """Tell the writer of the last words that they were read here."""
        self._store.add(_ACKS, 1)

    def wait_acknowledged(self, timeout_s: float) -> None:
        """Return when all others have read the last words; on rank 0 the store lives until then."""
        self._wait_counted(_ACKS, self.world_size - 1, timeout_s)

    def propose(self, reason: str) -> None:
        """Propose to stop; of several proposals the first counts."""
        self._store.compare_set(_PROPOSAL, "", reason)

    def proposal(self) -> str | None:
        return self._store.get(_PROPOSAL).decode() if self._store.check([_PROPOSAL]) else None

    def promise(self, turns: int) -> None:
        """Tell, once, how many turns this rank has begun and will not exceed by itself."""
        self._store.set(f"promise/{self.rank}", str(turns))
        if self._store.add(_PROMISES, 1) == self.world_size:
            promises = self._store.multi_get([f"promise/{rank}" for rank in range(self.world_size)])
            self._store.set(_LAST_TURN, str(max(map(int, promises))))

    def agreed(self) -> int | None:
        """The highest promise, when all ranks have made theirs."""
        return int(self._store.get(_LAST_TURN)) if self._store.check([_LAST_TURN]) else None

    def leave(self, timeout_s: float) -> None:
        """Say that this rank has come to a good end; rank 0 stays until all have, or for ``timeout_s``."""
        self._store.add(_LEFT, 1)
        if self.rank == 0:
            self._wait_counted(_LEFT, self.world_size, timeout_s)

    def _wait_counted(self, key: str, count: int, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self._store.add(key, 0) < count and time.monotonic() < deadline:
            time.sleep(0.05)


def within(timeout_s: float, action: Callable[[], Any]) -> bool:
    """Run ``action`` in a thread of its own; False when it failed or is not over after ``timeout_s``."""
    succeeded = threading.Event()

    def run() -> None:
        try:
            action()
        except (RuntimeError, OSError):
            return
        succeeded.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(timeout_s)
    return succeeded.is_set()


def _own_addresses(*, several_hosts: bool) -> list[str]:
    """Names by which other hosts may reach this one, the likeliest first."""
    if not several_hosts:
        return ["127.0.0.1"]
    addresses = [
        address.address
        for interface in psutil.net_if_addrs().values()
        for address in interface
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    return [socket.gethostname(), *addresses]


def _reachable(addresses: Sequence[str], port: int, comm: Communicator) -> str:
    for address in addresses:
        try:
            socket.create_connection((address, port), timeout=_TRY_TIMEOUT_S).close()
        except OSError:
            continue
        return address
    raise MachineError(
        f"rank {comm.rank} (host {comm.topology.host}) reaches rank 0 at none of {', '.join(addresses)}, port {port}"
    )
