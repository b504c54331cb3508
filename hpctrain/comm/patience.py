"""When a rank has waited too long, and what it must have read of its peers before it accuses one.

No threads, clock or network of its own: ``hpctrain.comm.watch`` passes in the time, where its training thread stands,
and what it reads from the side channel. That may come late, from a thread that was blocked: a reading counts only
when it was asked for after the training thread last moved on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hpctrain.comm.side_channel import Heartbeat
from hpctrain.topology.phases import STEP_PHASES, Phase

#: how often the watch looks and talks
POLL_S = 1.0
#: how far apart two readings of the heartbeats are that may call a process dead, and how long the keeper of the
#: side channel may be quiet before it is: a busy machine makes a thread miss a poll or two
_EVIDENCE_S = 2 * POLL_S
SILENCE_S = 3 * POLL_S
#: beyond this between two looks, this process stood still (suspended by Slurm, frozen with its machine), and its peers
#: most likely with it: that time is nobody's fault
_STANDSTILL_S = 5 * POLL_S
#: Rank 0, which has the heartbeats at hand, reads them from this long before the limit. The others would take them all
#: through its one network card at once: they read this long after the limit, when rank 0 has found nobody.
_LEAD_S = 4 * POLL_S
_PRECEDENCE_S = POLL_S

#: where the training thread stands: step, phase, signs of life since it began; a new object each time it moves on
Mark = tuple[int, Phase, int]


class Limit(NamedTuple):
    """How long a rank may show no progress, and the option that says so."""

    seconds: float
    option: str


@dataclass(frozen=True)
class Limits:
    """The limit of a step, and that of all until the first step is over: the longer of the two."""

    timeout_s: float
    startup_timeout_s: float

    @property
    def step(self) -> Limit:
        return Limit(self.timeout_s, "comm.timeout_s")

    @property
    def start(self) -> Limit:
        startup = Limit(self.startup_timeout_s, "comm.startup_timeout_s")
        return max(self.step, startup, key=lambda limit: limit.seconds)


@dataclass(frozen=True)
class Reading:
    """The heartbeats of all ranks, as they were at some moment between the asking and the answer."""

    asked_s: float
    answered_s: float
    beats: Sequence[Heartbeat]


class Patience:
    """That of one rank. All times are those of one monotonic clock.

    One thread calls ``look`` and decides by what the others tell, a second one may call ``answered`` and ``read``.
    """

    def __init__(self, limits: Limits, rank: int, mark: Mark, now_s: float) -> None:
        self._limits, self._rank = limits, rank
        self._seen = mark
        self._first_step: int | None = None
        self._looked_at = self._moved_at = self._answered_at = now_s
        self._fresh_since = now_s
        self._readings: list[Reading] = []

    def look(self, mark: Mark, now_s: float) -> None:
        """Note where the training thread stands; to be called every POLL_S."""
        stood_still_s = now_s - self._looked_at - POLL_S
        self._looked_at = now_s
        if stood_still_s > _STANDSTILL_S:
            self._moved_at += stood_still_s
            self._answered_at = self._fresh_since = now_s
        if mark is not self._seen:
            self._seen = mark
            self._moved_at = self._fresh_since = now_s
        step, phase, _ = mark
        if self._first_step is None and phase in STEP_PHASES:
            self._first_step = step

    def waited_s(self, now_s: float) -> float:
        """How long the training thread has not moved on, while this process ran."""
        return now_s - self._moved_at

    @property
    def limit(self) -> Limit:
        """How long it may wait. A resumed run begins at any step, and its first one is slow as well."""
        started = self._first_step is not None and self._seen[0] > self._first_step
        return self._limits.step if started else self._limits.start

    def wants_reading(self, now_s: float) -> bool:
        """Whether the heartbeats of all ranks are to be read now."""
        limit_s = self.limit.seconds
        from_s = limit_s - min(_LEAD_S, limit_s / 2) if self._rank == 0 else limit_s + _PRECEDENCE_S
        return self.waited_s(now_s) > from_s

    def read(self, reading: Reading) -> None:
        """Keep the first reading since the training thread moved on, and this one, the latest."""
        self._readings = [*self._fresh[:1], reading]
        self.answered(reading.answered_s)

    def evidence(self) -> tuple[Sequence[Heartbeat], Sequence[Heartbeat]] | None:
        """Two readings, far enough apart for every living process to have written between them."""
        match self._fresh:
            case [first, last] if last.asked_s - first.answered_s >= _EVIDENCE_S:
                return first.beats, last.beats
        return None

    def answered(self, now_s: float) -> None:
        """The keeper of the side channel has answered."""
        self._answered_at = now_s

    def quiet_s(self, now_s: float) -> float:
        """How long it has not."""
        return now_s - self._answered_at

    @property
    def _fresh(self) -> list[Reading]:
        return [reading for reading in self._readings if reading.asked_s > self._fresh_since]
