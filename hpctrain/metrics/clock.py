"""Where the time of a step goes: phases of the training loop, clocked without stopping it.

On a CPU a boundary between phases is a reading of the system's clock. On a GPU it is an event put into the
current stream and read at log time, so nothing is synchronised between two logged steps; a phase then lasts as
long as the stream was busy or idle in it, and waiting for the loader or for the network counts only as far as
it keeps the GPU from working. This module measures; what is told of it is in ``steplog`` and ``record``.

A step's time runs from the end of the step before it to its own end, less evaluations and checkpoints in
between: logging and the loop's own work count, in no phase. Rates of a run leave out a warm-up
(``WARMUP_RULE``), since first steps pay for compilation, memory pools and the filling of queues.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch

from hpctrain.metrics.spread import Spread
from hpctrain.topology.phases import OUTSIDE, STEP_PHASES, Phase

#: phases of a step as the loop enters them, and the keys their seconds are recorded under
RECORDED_AS = {**{phase: str(phase) for phase in STEP_PHASES}, "exchange": "exposed_comm"}

WARMUP_RULE = (
    "without the first 10 % of the steps (at least 5, at most 50, never more than half) "
    "and the first step after each evaluation or checkpoint"
)

_NUM_PHASES = len(RECORDED_AS)
_COLUMNS = {phase: column for column, phase in enumerate((*RECORDED_AS, *OUTSIDE))}
_NO_PHASE = len(_COLUMNS)
_MAX_PENDING_STEPS = 256


def synchronise(device: torch.device) -> None:
    """Wait until all work given to ``device`` is done, for whoever times it with the system's clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timer(Protocol):
    """Marks moments, and tells later how far apart they were."""

    def mark(self) -> Any: ...

    def wait(self, mark: Any) -> None: ...

    def seconds(self, start: Any, end: Any) -> float: ...

    def reuse(self, marks: list[Any]) -> None: ...


class HostTimer:
    """The system's monotonic clock; a mark is a time in nanoseconds."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def wait(self, mark: int) -> None:
        """A moment that was marked is over."""

    def seconds(self, start: int, end: int) -> float:
        return (end - start) * 1e-9

    def reuse(self, marks: list[int]) -> None:
        """Numbers need no pool."""


class CudaTimer:
    """Events in the current stream, from a pool: creating one costs more than recording it."""

    def __init__(self) -> None:
        self._pool: list[torch.cuda.Event] = []

    def mark(self) -> torch.cuda.Event:
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def wait(self, mark: torch.cuda.Event) -> None:
        mark.synchronize()

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def reuse(self, marks: list[torch.cuda.Event]) -> None:
        self._pool.extend(marks)


@dataclass(frozen=True, slots=True)
class Interval:
    """Steps since the last reading: how many, their seconds, and the median seconds of each phase."""

    steps: int
    seconds: float
    phases_s: dict[str, float]

    def images_per_s(self, batch_global: int) -> float:
        """Images of the interval over its time; NaN for an interval without steps."""
        return self.steps * batch_global / self.seconds if self.seconds else math.nan


@dataclass(frozen=True, slots=True)
class RunTimes:
    """All steps of this process: medians after warm-up, and what went on between steps.

    ``step_s`` [steps_measured] float32 are the steps the rates are made of; ``outside_s`` holds total seconds
    of evaluations and checkpoints.
    """

    steps: int
    step_s: np.ndarray
    phases_s: dict[str, float]
    outside_s: dict[str, float]

    def throughput(self, batch_global: int) -> dict[str, Any]:
        """Images per second over steps after warm-up: median, 5th and 95th percentile, and total over time."""
        step_s = self.step_s.astype(np.float64)
        if not len(step_s):
            figures = dict.fromkeys(("median", "p5", "p95", "mean"), math.nan)
        else:
            figures = {**asdict(Spread.of(batch_global / step_s)), "mean": batch_global / float(step_s.mean())}
        return {"images_per_s": figures, "steps_measured": len(self.step_s), "warmup_rule": WARMUP_RULE}


class _StepTable:
    """Rows of float32, one a step: seconds of each phase, of the step, and of the pause before it.

    28 bytes a step: a million steps stay under 60 MB with the spare room of doubling.
    """

    def __init__(self) -> None:
        self._rows = np.empty((1024, _NUM_PHASES + 2), dtype=np.float32)
        self.length = 0

    def append(self, row: list[float]) -> None:
        if self.length == len(self._rows):
            self._rows = np.concatenate([self._rows, np.empty_like(self._rows)])
        self._rows[self.length] = row
        self.length += 1

    def since(self, first: int) -> np.ndarray:
        return self._rows[first : self.length]


class PhaseClock:
    """Called by the loop at every boundary: ``step``, then ``enter`` for each phase, then ``end_step``.

    A phase may be entered several times in a step (accumulation); its seconds add up. ``enter("eval")`` and
    ``enter("checkpoint")`` belong between ``end_step`` and the next ``step``. ``on_enter(step, phase)`` is
    called on the host at each ``enter``, for whoever watches over the ranks.
    """

    def __init__(self, device: torch.device, on_enter: Callable[[int, Phase], None] | None = None) -> None:
        self._timer: Timer = CudaTimer() if device.type == "cuda" else HostTimer()
        self._on_enter = on_enter
        self._step = 0
        self._boundaries: list[tuple[int, Any]] = []
        self._pending: list[list[tuple[int, Any]]] = []
        self._table = _StepTable()
        self._interval_start = 0
        self._outside_s: dict[str, float] = dict.fromkeys(OUTSIDE, 0.0)

    def resume(self, step: int) -> None:
        """Stand behind step number ``step``, which an earlier launch has taken."""
        self._step = step

    def step(self, step: int) -> None:
        """Begin step number ``step``, in no phase yet."""
        self._step = step
        self._boundaries.append((_NO_PHASE, self._timer.mark()))

    def enter(self, phase: Phase) -> None:
        """End the phase that runs and begin ``phase``; nothing but a sign of life where that is the one that runs."""
        column = _COLUMNS[phase]
        if not self._boundaries or self._boundaries[-1][0] != column:
            self._boundaries.append((column, self._timer.mark()))
        if self._on_enter is not None:
            self._on_enter(self._step, phase)

    def end_step(self) -> None:
        """End the step and the phase that runs."""
        end = (_NO_PHASE, self._timer.mark())
        self._boundaries.append(end)
        self._pending.append(self._boundaries)
        self._boundaries = [end]
        if len(self._pending) >= _MAX_PENDING_STEPS:
            # The older half is long over: reading it does not hold the host up.
            self._settle(_MAX_PENDING_STEPS // 2)

    def interval(self) -> Interval:
        """The steps that ended since the last call; waits for the last of them to be over on the GPU."""
        self._settle(len(self._pending))
        rows = self._table.since(self._interval_start)
        self._interval_start = self._table.length
        return _interval_of(rows)

    def recent(self, steps: int) -> Interval:
        """The last ``steps`` steps that ended, or all if they are fewer; ``interval`` does not notice."""
        self._settle(len(self._pending))
        rows = self._table.since(max(0, self._table.length - steps))
        return _interval_of(rows)

    def summary(self) -> RunTimes:
        """All steps so far, by ``WARMUP_RULE``; ends an evaluation or checkpoint that runs."""
        self._settle(len(self._pending))
        if self._boundaries:
            end = (_NO_PHASE, self._timer.mark())
            self._timer.wait(end[1])
            self._add_outside(self._seconds([*self._boundaries, end]))
            self._boundaries = [end]
        rows = self._table.since(0)
        measured = after_warmup(rows[:, _NUM_PHASES + 1] > 0)
        return RunTimes(len(rows), rows[measured, _NUM_PHASES], _medians(rows[measured]), dict(self._outside_s))

    def _settle(self, count: int) -> None:
        """Turn the marks of the oldest ``count`` pending steps into rows of seconds."""
        settled, self._pending = self._pending[:count], self._pending[count:]
        if settled:
            self._timer.wait(settled[-1][-1][1])
        for boundaries in settled:
            seconds = self._seconds(boundaries)
            pause_s = self._add_outside(seconds)
            self._table.append([*seconds[:_NUM_PHASES], sum(seconds) - pause_s, pause_s])
            # The last mark is also the first of the step that follows.
            self._timer.reuse([mark for _, mark in boundaries[:-1]])

    def _seconds(self, boundaries: list[tuple[int, Any]]) -> list[float]:
        seconds = [0.0] * (_NO_PHASE + 1)
        for (column, start), (_, end) in pairwise(boundaries):
            seconds[column] += self._timer.seconds(start, end)
        return seconds

    def _add_outside(self, seconds: list[float]) -> float:
        for phase in OUTSIDE:
            self._outside_s[phase] += seconds[_COLUMNS[phase]]
        return sum(seconds[_COLUMNS[phase]] for phase in OUTSIDE)


def after_warmup(paused: np.ndarray) -> np.ndarray:
    """Indices of the steps that ``WARMUP_RULE`` keeps.

    ``paused`` [steps] bool marks steps that followed an evaluation or checkpoint. When only such steps would
    be left, they are kept.
    """
    steps = len(paused)
    dropped = min(50, max(5, math.ceil(steps / 10)), steps // 2)
    kept = np.arange(dropped, steps)
    undisturbed = kept[~paused[dropped:]]
    return undisturbed if len(undisturbed) else kept


def _interval_of(rows: np.ndarray) -> Interval:
    return Interval(len(rows), float(rows[:, _NUM_PHASES].sum(dtype=np.float64)), _medians(rows))


def _medians(rows: np.ndarray) -> dict[str, float]:
    """Median of each phase's column, by its recorded key; NaN without rows."""
    if not len(rows):
        return dict.fromkeys(RECORDED_AS.values(), math.nan)
    medians = np.median(rows[:, :_NUM_PHASES], axis=0).tolist()
    return dict(zip(RECORDED_AS.values(), medians, strict=True))
