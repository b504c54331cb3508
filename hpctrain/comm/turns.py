"""The agreement of all ranks to stop before the same turn, when some of them are asked to.

A turn is a stretch of the program that every rank passes in the same order and number: an optimizer step, a batch of
an evaluation. Turns cost the training thread an uncontended lock each; a second thread talks to the side channel
once a second, so no collective of the engine is spent on a question that is nearly always answered with no.

1. A rank that is asked to stop proposes it.
2. Each rank that reads the proposal promises: it begins no turn beyond those it has begun, until all have promised,
   and says how many these are. The two are one action under the lock.
3. The highest promise is where all stop: known to all, never below what any rank has begun, and beyond it no rank
   goes. Ranks with a lower promise go on to it.

A rank that holds at its promise waits for the others' threads, never for their training: these may be stuck in a
collective that needs the one that holds, and promise all the same. Where a rank is gone, the watch ends the job.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Protocol

from hpctrain.topology.ranks import Topology

_POLL_S = 1.0
_HURRY_S = 0.1


class Stopped(Exception):
    """All ranks leave their work before the same turn; ``reason`` says who was asked, and by what."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Board(Protocol):
    """Where ranks leave word for each other, as a ``SideChannel``. Raises RuntimeError when it is gone."""

    def propose(self, reason: str) -> None:
        """Propose to stop, unless another rank has."""

    def proposal(self) -> str | None:
        """The reason of the first proposal."""

    def promise(self, turns: int) -> None:
        """Say, once, how many turns this rank has begun and will not exceed by itself."""

    def agreed(self) -> int | None:
        """The highest promise, when all ranks have made theirs."""


class Turns:
    """One rank's part in the agreement. ``asked`` gives the reason for which this rank is to stop, or None.

    With several ranks ``start`` begins the thread that talks to ``board``; one rank asks itself at each turn.
    """

    def __init__(self, board: Board, topology: Topology, asked: Callable[[], str | None]) -> None:
        self._board, self._topology, self._asked = board, topology, asked
        self._lock = threading.Lock()
        self._begun = 0
        self._promised = False
        self._reason = ""
        self._last_turn = 0
        self._agreed = threading.Event()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._began_s: float | None = None
        #: how long the latest turn that is over took, with what the program did before the next one
        self.turn_s = 0.0

    def start(self) -> None:
        """Begin to talk to the others, where there are any."""
        if self._topology.world_size > 1:
            self._thread = threading.Thread(target=self._talk, name="hpctrain-turns", daemon=True)
            self._thread.start()

    def begin(self) -> None:
        """Call before each turn. Raises Stopped where all ranks stop; may wait for their promises before that."""
        now_s = time.monotonic()
        if self._began_s is not None:
            self.turn_s = now_s - self._began_s
        self._began_s = now_s
        if self._topology.world_size == 1:
            reason = self._asked()
            if reason is not None:
                raise Stopped(reason)
            return
        with self._lock:
            if not self._promised:
                self._begun += 1
                return
        self._agreed.wait()
        if self._begun == self._last_turn:
            raise Stopped(self._reason)
        self._begun += 1

    def exchange(self) -> bool:
        """One round on the board; whether there is nothing left to say."""
        reason = self._board.proposal()
        if reason is None:
            mine = self._asked()
            if mine is None:
                return False
            self._board.propose(f"{mine} on rank {self._topology.rank} (host {self._topology.host})")
            reason = self._board.proposal()
        if not self._promised:
            self._reason = reason or ""
            with self._lock:
                self._promised = True
            self._board.promise(self._begun)
        agreed = self._board.agreed()
        if agreed is None:
            return False
        self._last_turn = agreed
        self._agreed.set()
        return True

    def close(self) -> None:
        """End the thread, after the last turn."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(2 * _POLL_S)

    def _talk(self) -> None:
        try:
            while not self._closing.wait(_HURRY_S if self._promised else _POLL_S):
                if self.exchange():
                    return
        except RuntimeError:
            return  # the channel is gone, which the watch finds as well, and ends the job
