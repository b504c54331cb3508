"""One of two ranks of ``benchmarks.launching``: what the watch, the turns, the clock and the signals cost a step.

Steps of 20 ms, filled with matrix products, make the calls of a training step that keep it watched and stoppable,
and each call is timed. What the threads beside it use is read from the clocks of the process and its threads.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.timing import seconds_of
from hpctrain.config.comm import CommConfig
from hpctrain.config.schema import LogConfig
from hpctrain.launch.preempt import Requests
from hpctrain.launch.timelimit import TimeLimit
from hpctrain.metrics.clock import PhaseClock
from hpctrain.metrics.stragglers import StragglerWatch
from hpctrain.topology.phases import OWN_PHASES, STEP_PHASES
from hpctrain.train.session import Session, open_session
from tests.parallel.launch import report

STEP_S = 0.02
_SIDE = 192
_CALLS = 2000
_HOUR_S = 3600.0


class Steps:
    """Steps as a training takes them, less the training."""

    def __init__(self, session: Session) -> None:
        self._turns = session.turns
        self._clock = PhaseClock(session.comm.device, session.watch.beat)
        self._matrix = torch.rand(_SIDE, _SIDE)
        #: seconds of each step's calls
        self.turns_s: list[float] = []
        self.phases_s: list[float] = []

    def run(self, number: int) -> None:
        """Take one step. Its phases are equally long."""
        ends = time.perf_counter() + STEP_S * np.arange(1, 1 + len(STEP_PHASES)) / len(STEP_PHASES)
        self.turns_s.append(seconds_of(self._turns.begin))
        phases_s = seconds_of(lambda: self._clock.step(number))
        for phase, end in zip(STEP_PHASES, ends.tolist(), strict=True):
            phases_s += seconds_of(partial(self._clock.enter, phase))
            while time.perf_counter() < end:
                torch.mm(self._matrix, self._matrix)
        self.phases_s.append(phases_s + seconds_of(self._clock.end_step))


def in_a_row_us(action: Callable[[], object]) -> float:
    """Microseconds of one call of many."""
    return seconds_of(lambda: [action() for _ in range(_CALLS)]) / _CALLS * 1e6


def judge_us(world_size: int) -> float:
    """A search for slow ranks among ``world_size`` of equal pace, which a logged step makes."""
    watch = StragglerWatch([f"n{rank}" for rank in range(world_size)])
    seconds = 0.005 + 1e-4 * np.random.default_rng(0).random((world_size, len(OWN_PHASES)))
    return in_a_row_us(lambda: watch.judge(seconds, 1, 20))


def thread_cpu_s() -> dict[str, float]:
    """Seconds of CPU of this program's threads by name, and under ``process`` of all there are."""
    found = {"process": time.process_time()}
    for thread in threading.enumerate():
        assert thread.ident is not None
        found[thread.name] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
    return found


def background(before: dict[str, float], after: dict[str, float], wall_s: float) -> dict[str, float]:
    """Seconds of CPU a second of each thread but the main one; ``native`` are those that python does not know, such as
    the server of the side channel on rank 0."""
    used = {name: (after[name] - before[name]) / wall_s for name in after}
    process, main = used.pop("process"), used.pop("MainThread")
    return {**used, "native": max(0.0, process - main - sum(used.values()))}


def main() -> None:
    wanted = int(float(sys.argv[1]) / STEP_S)
    torch.set_num_threads(1)
    with Requests(("USR1", "USR2", "TERM")) as requests:
        requests.limit = TimeLimit(time.time() + _HOUR_S, 60.0, lambda: 0.0, lambda: 0.0)
        with open_session(CommConfig(engine="mpi"), "cpu", requests.asked) as session:
            steps = Steps(session)
            session.comm.barrier()
            before, started = thread_cpu_s(), time.perf_counter()
            for number in range(wanted):
                steps.run(number)
            wall_s = time.perf_counter() - started
            threads = background(before, thread_cpu_s(), wall_s)
            found = {
                "steps": wanted,
                "wall_s": wall_s,
                "turns_us": figures(steps.turns_s),
                "phases_us": figures(steps.phases_s),
                "beat_us": in_a_row_us(partial(session.watch.beat, wanted, "end")),
                "asked_us": in_a_row_us(requests.asked),
                "judge_us": {size: judge_us(size) for size in (2, 1024)},
                "log_every_steps": LogConfig().every_steps,
                "threads_cpu_s_per_s": threads,
            }
    report(found)


def figures(seconds: list[float]) -> dict[str, float]:
    """Of one step, in microseconds; the first steps warm caches."""
    steady = [1e6 * one for one in seconds[len(seconds) // 10 :]]
    return {"median": statistics.median(steady), "mean": statistics.fmean(steady)}


if __name__ == "__main__":
    main()
