"""The watch of a rank over itself and its peers: it ends this process when another has failed or none moves on.

Two daemon threads: one talks to the side channel and may block there, the other only looks at clocks, so that a
hung host of rank 0 cannot silence it. The training thread tells where it stands by ``beat``, a single assignment.
"""

from __future__ import annotations

import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from hpctrain.comm.abort import Guard
from hpctrain.comm.base import Communicator
from hpctrain.comm.lateness import describe, find_late, place_of
from hpctrain.comm.process import end_process
from hpctrain.comm.side_channel import Heartbeat, LastWords, SideChannel, within
from hpctrain.topology.phases import PHASES, STEP_PHASES, Phase

_POLL_S = 1.0
#: how far apart two readings of the heartbeats are that may call a process dead, and how long the keeper of the
#: side channel may be quiet before it is: a busy machine makes a thread miss a poll or two
_EVIDENCE_S = 2 * _POLL_S
_SILENCE_S = 3 * _POLL_S
#: beyond this between two looks, this process stood still (suspended by Slurm, frozen with its machine), and its peers
#: most likely with it: that time is nobody's fault
_STANDSTILL_S = 5 * _POLL_S
#: how long an engine may take to write its trace: the others' lingering covers it
_TRACE_S = 2.0
#: how long a failing rank lets the others read why, and how long they look before they call an error their own
LINGER_S = 3.0
_FAREWELL_S = 0.3


class Watch:
    """Started by its constructor; with one rank there is nobody to watch and no thread."""

    def __init__(self, channel: SideChannel, comm: Communicator, timeout_s: float, startup_timeout_s: float) -> None:
        self.comm = comm
        self._channel = channel
        self._timeout_s, self._startup_timeout_s = timeout_s, startup_timeout_s
        # step, phase, signs of life since it began
        self._mark: tuple[int, Phase, int] = (0, PHASES[0], 0)
        self._seen = self._mark
        self._first_step: int | None = None
        self._moved_at = self._answered_at = self._looked_at = time.monotonic()
        self._keeper_stood = ""
        self._readings: list[tuple[float, list[Heartbeat]]] = []
        self._suspicious = threading.Event()
        self._tracing = threading.Lock()
        self._trace_told: str | None = None
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
        within(self._timeout_s, lambda: self._channel.leave(self._timeout_s))
        for thread in self._threads:
            thread.join(2 * _POLL_S)

    def _talk(self) -> None:
        """Publish this rank's heartbeat, and end with the job when it has last words."""
        count = 0
        try:
            while not self._closing.wait(_POLL_S):
                count += 1
                self._channel.beat(self._heartbeat(count))
                words = self._channel.last_words()
                if words is not None and words.rank != self.comm.rank:
                    self._end_after(words)
                if self._suspicious.is_set():
                    self._readings = [*self._readings[:1], (time.monotonic(), self._channel.heartbeats())]
                if self.comm.rank > 0:
                    self._keeper_stood = f", last seen in {place_of(self._channel.heartbeat(0))}"
                self._answered_at = time.monotonic()
        except RuntimeError:
            self._end_without_store()

    def _look(self) -> None:
        """Compare this rank's own progress with the time it may take."""
        while not self._closing.wait(_POLL_S):
            waited_s = self._measure(time.monotonic())
            limit_s = self._limit_s()
            if waited_s > limit_s - min(4 * _POLL_S, limit_s / 2):
                self._suspicious.set()
            if waited_s > limit_s and (self._evident or self._keeper_quiet_s > _SILENCE_S):
                self._end_late(waited_s)

    def _measure(self, now_s: float) -> float:
        """How long this rank's training thread has not moved on, while this process ran."""
        stood_still_s = now_s - self._looked_at - _POLL_S
        self._looked_at = now_s
        if stood_still_s > _STANDSTILL_S:
            self._moved_at += stood_still_s
            self._answered_at = now_s
            self._trust()
        if self._mark is not self._seen:
            self._seen, self._moved_at = self._mark, now_s
            self._trust()
        step, phase, _ = self._seen
        if self._first_step is None and phase in STEP_PHASES:
            self._first_step = step
        return now_s - self._moved_at

    def _trust(self) -> None:
        self._suspicious.clear()
        self._readings = []

    def _limit_s(self) -> float:
        """The startup limit holds until a first step is over, whatever number a resumed run begins at."""
        started = self._first_step is not None and self._mark[0] > self._first_step
        return self._timeout_s if started else max(self._timeout_s, self._startup_timeout_s)

    def _heartbeat(self, count: int) -> Heartbeat:
        step, phase, ticks = self._mark
        age_s = time.monotonic() - self._moved_at
        return Heartbeat(self.comm.rank, self.comm.topology.host, step, phase, ticks, age_s, count)

    def _end_late(self, waited_s: float) -> NoReturn:
        option = "comm.timeout_s" if self._limit_s() == self._timeout_s else "comm.startup_timeout_s"
        if self._evident:
            (_, before), (_, now) = self._readings
            verdict = find_late(before, now)
            text = describe(verdict, waited_s, option)
            late = tuple(beat.rank for beat in verdict.late) if verdict.others else ()
        else:
            text = (
                f"no progress for {waited_s:.0f} s: {self._keeper} has not answered for "
                f"{self._keeper_quiet_s:.0f} s{self._keeper_stood}; raise {option} if that may take so long"
            )
            late = (0,)
        printed = f"[{self.place}] {text}{self._evidence(late)}"
        self.report_failure(text, printed, kind="late", late=late)
        end_process(1)

    def _end_after(self, words: LastWords) -> NoReturn:
        """Tell in one line what another rank said, and end."""
        author = f"rank {words.rank} on host {words.host}"
        if words.kind == "late":
            self._print(f"{author} found {words.summary}; this rank stops{self._evidence(words.late)}")
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
        if self._closing.wait(_POLL_S):
            return
        self._print(f"{self._keeper} disappeared without an error message{self._keeper_stood}; stopping")
        end_process(1)

    @property
    def _evident(self) -> bool:
        times = [time_s for time_s, _ in self._readings]
        return bool(times) and times[-1] - times[0] >= _EVIDENCE_S

    @property
    def _keeper_quiet_s(self) -> float:
        return time.monotonic() - self._answered_at

    @property
    def _keeper(self) -> str:
        return f"rank 0 (host {self._channel.server_host}), which keeps the side channel,"

    def _print(self, line: str) -> None:
        print(f"[{self.place}] {line}", file=sys.stderr, flush=True)

    def _evidence(self, late: tuple[int, ...]) -> str:
        """What only this rank can tell of a hang, in further lines: its engine's trace, and its stack if it is late."""
        return self._write_trace() + (self._stack() if self.comm.rank in late else "")

    def _write_trace(self) -> str:
        """Once, though both threads may come to it."""
        with self._tracing:
            if self._trace_told is None:
                paths: list[Path | None] = []
                if not within(_TRACE_S, lambda: paths.append(self.comm.dump_trace())):
                    self._trace_told = f"\nthe {self.comm.name} engine could not write its trace"
                elif paths[0] is None:
                    self._trace_told = ""
                else:
                    self._trace_told = f"\nthe {self.comm.name} engine's trace of this rank is {paths[0]}"
            return self._trace_told

    def _stack(self) -> str:
        """Where the training thread stands."""
        main = threading.main_thread().ident
        frame = sys._current_frames().get(main) if main is not None else None
        if frame is None:
            return ""
        return f"\nrank {self.comm.rank} stands at\n" + "".join(traceback.format_stack(frame)).rstrip()
