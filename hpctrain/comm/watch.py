"""The watch of a rank over itself and its peers: it ends this process when another has failed or none moves on.

Two daemon threads: one talks to the side channel and may block there, the other only looks at clocks, so that a
hung host of rank 0 cannot silence it. The training thread tells where it stands by ``beat``, a single assignment.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import NoReturn

from hpctrain.comm.abort import Guard
from hpctrain.comm.base import Communicator
from hpctrain.comm.evidence import Evidence
from hpctrain.comm.lateness import describe, find_late, place_of
from hpctrain.comm.patience import POLL_S, SILENCE_S, Limits, Mark, Patience, Reading
from hpctrain.comm.process import end_process
from hpctrain.comm.side_channel import Heartbeat, LastWords, SideChannel, within
from hpctrain.topology.phases import PHASES, Phase

#: how long a failing rank lets the others read why, and how long they look before they call an error their own
LINGER_S = 3.0
_FAREWELL_S = 0.3


class Watch:
    """Started by its constructor; with one rank there is nobody to watch and no thread."""

    def __init__(self, channel: SideChannel, comm: Communicator, limits: Limits) -> None:
        self.comm = comm
        self._channel = channel
        self._limits = limits
        self._mark: Mark = (0, PHASES[0], 0)
        self._patience = Patience(limits, comm.rank, self._mark, time.monotonic())
        self._evidence = Evidence(comm)
        self._keeper_stood = ""
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        comm.arrive = self.tick
        if comm.world_size > 1:
            self._threads = [
                threading.Thread(target=loop, name=f"hpctrain-{name}", daemon=True)
                for name, loop in (("channel", self._talk), ("watch", self._look))
            ]
        for thread in self._threads:
            thread.start()

    def beat(self, step: int, phase: Phase) -> None:
        """Say that the training thread enters ``phase`` of ``step``; to enter it once more is a ``tick``."""
        now_step, now_phase, ticks = self._mark
        again = step == now_step and phase == now_phase
        self._mark = (step, phase, ticks + 1 if again else 0)

    def tick(self) -> None:
        """Say that the training thread has done one more part of the phase it is in, as all ranks do."""
        step, phase, ticks = self._mark
        self._mark = (step, phase, ticks + 1)

    def guard(self) -> Guard:
        """A context whose uncaught exceptions end the job on all ranks."""
        return Guard(self)

    @property
    def place(self) -> str:
        """Who and where this rank is, for the head of a message."""
        step, phase, _ = self._mark
        return f"rank {self.comm.rank} on host {self.comm.topology.host}, step {step}, phase {phase}"

    def report_failure(
        self, summary: str, printed: str, *, kind: str = "error", code: int = 1, late: tuple[int, ...] = ()
    ) -> None:
        """Print ``printed`` and make the line ``summary`` the job's last words, unless another rank's came first:
        then that rank's are told in one line and this process ends.

        Returns when the others have read them, after ``LINGER_S`` at the most. ``kind``, ``code`` and ``late`` as in
        ``LastWords``.
        """
        claimed: list[bool] = []
        reached = bool(self._threads) and within(LINGER_S, lambda: claimed.append(self._channel.claim()))
        if reached and not claimed[0]:
            self.wait_for_cause()
        print(printed, file=sys.stderr, flush=True)
        if reached:
            step, phase, _ = self._mark
            words = LastWords(self.comm.rank, self.comm.topology.host, step, phase, kind, summary, code, late)
            within(LINGER_S, lambda: self._channel.write_last_words(words))
            within(LINGER_S, lambda: self._channel.wait_acknowledged(LINGER_S))

    def wait_for_cause(self) -> None:
        """Give another rank's last words the time to arrive; they end this process."""
        time.sleep(LINGER_S)

    def close(self) -> None:
        """End the watch after a good end. Collective; rank 0 leaves last, within the timeout."""
        if not self._threads:
            return
        self._closing.set()
        within(self._limits.timeout_s, lambda: self._channel.leave(self._limits.timeout_s))
        for thread in self._threads:
            thread.join(2 * POLL_S)

    def _talk(self) -> None:
        """Publish this rank's heartbeat, and end with the job when it has last words."""
        count = 0
        try:
            while not self._closing.wait(POLL_S):
                count += 1
                self._channel.beat(self._heartbeat(count))
                words = self._channel.last_words()
                if words is not None and words.rank != self.comm.rank:
                    self._end_after(words)
                if self.comm.rank > 0:
                    self._keeper_stood = f", last seen in {place_of(self._channel.heartbeat(0))}"
                now_s = time.monotonic()
                self._patience.answered(now_s)
                if self._patience.wants_reading(now_s):
                    beats = self._channel.heartbeats()
                    self._patience.read(Reading(now_s, time.monotonic(), beats))
        except RuntimeError:
            self._end_without_store()

    def _look(self) -> None:
        """Compare this rank's own progress with the time it may take."""
        while not self._closing.wait(POLL_S):
            now_s = time.monotonic()
            self._patience.look(self._mark, now_s)
            if self._patience.waited_s(now_s) > self._patience.limit.seconds:
                self._accuse(now_s)

    def _heartbeat(self, count: int) -> Heartbeat:
        step, phase, ticks = self._mark
        age_s = self._patience.waited_s(time.monotonic())
        return Heartbeat(self.comm.rank, self.comm.topology.host, step, phase, ticks, age_s, count)

    def _accuse(self, now_s: float) -> None:
        """End the job once it is clear who is late."""
        waited_s, option = self._patience.waited_s(now_s), self._patience.limit.option
        evidence, quiet_s = self._patience.evidence(), self._patience.quiet_s(now_s)
        if evidence is not None:
            verdict = find_late(*evidence)
            self._end_late(describe(verdict, waited_s, option), verdict.accused)
        if quiet_s > SILENCE_S:
            text = (
                f"no progress for {waited_s:.0f} s: {self._keeper} has not answered for {quiet_s:.0f} s"
                f"{self._keeper_stood}; raise {option} if that may take so long"
            )
            self._end_late(text, (0,))

    def _end_late(self, text: str, late: tuple[int, ...]) -> NoReturn:
        printed = f"[{self.place}] {text}{self._evidence.lines(late)}"
        self.report_failure(text, printed, kind="late", late=late)
        end_process(1)

    def _end_after(self, words: LastWords) -> NoReturn:
        """Tell in one line what another rank said, and end."""
        author = f"rank {words.rank} on host {words.host}"
        if words.kind == "late":
            self._print(f"{author} found {words.summary}; this rank stops{self._evidence.lines(words.late)}")
        elif words.kind == "error":
            place = f"in step {words.step}, phase {words.phase}"
            self._print(f"{author} failed {place}: {words.summary}; this rank stops")
        self._channel.acknowledge()
        if self.comm.rank == 0:
            # The store goes with this process: stay until the others have read it, and seen that all have.
            self._channel.wait_acknowledged(LINGER_S)
            time.sleep(_FAREWELL_S)
        end_process(words.code)

    def _end_without_store(self) -> None:
        """Rank 0's server closed the connection. After a good end that is as it should be."""
        if self._closing.wait(POLL_S):
            return
        self._print(f"{self._keeper} disappeared without an error message{self._keeper_stood}; stopping")
        end_process(1)

    @property
    def _keeper(self) -> str:
        return f"rank 0 (host {self._channel.server_host}), which keeps the side channel,"

    def _print(self, line: str) -> None:
        print(f"[{self.place}] {line}", file=sys.stderr, flush=True)
