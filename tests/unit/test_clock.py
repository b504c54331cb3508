"""The phase clock against a hand-driven time."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.metrics import clock as clock_module
from hpctrain.metrics.clock import PhaseClock, after_warmup

CPU = torch.device("cpu")
KEYS = {"data", "forward", "backward", "exposed_comm", "optimizer"}


class FakeTimer:
    """Moments are numbers that the test moves; like events, they can be read only after a wait, and are reused."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.readable_until_s = 0.0
        self.waits = 0
        self.in_use: set[int] = set()
        self.moments: dict[int, float] = {}
        self.pool: list[int] = []

    def mark(self) -> int:
        mark = self.pool.pop() if self.pool else len(self.moments)
        assert mark not in self.in_use
        self.in_use.add(mark)
        self.moments[mark] = self.now_s
        return mark

    def wait(self, mark: int) -> None:
        assert mark in self.in_use
        self.waits += 1
        self.readable_until_s = max(self.readable_until_s, self.moments[mark])

    def seconds(self, start: int, end: int) -> float:
        assert {start, end} <= self.in_use
        assert self.moments[end] <= self.readable_until_s, "read before the device came there"
        return self.moments[end] - self.moments[start]

    def reuse(self, marks: list[int]) -> None:
        self.in_use -= set(marks)
        self.pool.extend(marks)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> FakeTimer:
    timer = FakeTimer()
    monkeypatch.setattr(clock_module, "HostTimer", lambda: timer)
    return timer


def one_step(clock: PhaseClock, timer: FakeTimer, step: int, forward_s: float = 2.0) -> None:
    """10 s a step with forward_s = 2: 1 data, 2 forward, 3 backward, 0.5 exchange, 1.5 optimizer, 2 in no phase."""
    clock.step(step)
    timer.now_s += 1.5
    for phase, seconds in [("data", 1.0), ("forward", forward_s), ("backward", 3.0), ("exchange", 0.5)]:
        clock.enter(phase)  # type: ignore[arg-type]
        timer.now_s += seconds
    clock.enter("optimizer")
    timer.now_s += 1.5
    clock.end_step()
    timer.now_s += 0.5


def test_phases_add_up_and_keep_their_recorded_names(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    for step in range(4):
        one_step(clock, timer, step)
    interval = clock.interval()
    assert interval.phases_s == {
        "data": 1.0, "forward": 2.0, "backward": 3.0, "exposed_comm": 0.5, "optimizer": 1.5,
    }  # fmt: skip
    assert interval.steps == 4
    # 9.5 s for the first step, which has no logging before it, and 10 s for each of the others.
    assert interval.seconds == 39.5


def test_time_between_steps_counts_but_evaluation_and_checkpoint_do_not(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    one_step(clock, timer, 1)
    clock.interval()
    clock.enter("eval")
    timer.now_s += 100.0
    clock.enter("checkpoint")
    timer.now_s += 30.0
    one_step(clock, timer, 2)
    assert clock.interval().seconds == pytest.approx(10.0)
    one_step(clock, timer, 3)
    clock.enter("eval")
    timer.now_s += 7.0
    assert clock.summary().outside_s == {"eval": 107.0, "checkpoint": 30.0}
    assert clock.summary().outside_s == {"eval": 107.0, "checkpoint": 30.0}, "a second look must not add"


def test_repeated_phases_of_accumulation_add_up(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    clock.step(1)
    for _ in range(3):
        clock.enter("forward")
        timer.now_s += 2.0
        clock.enter("backward")
        timer.now_s += 4.0
    clock.end_step()
    phases_s = clock.interval().phases_s
    assert (phases_s["forward"], phases_s["backward"], phases_s["data"]) == (6.0, 12.0, 0.0)


def test_interval_is_the_median_since_the_last_one(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    one_step(clock, timer, 1, forward_s=50.0)
    assert clock.interval().phases_s["forward"] == 50.0
    for step, forward_s in enumerate([1.0, 2.0, 99.0]):
        one_step(clock, timer, step, forward_s)
    interval = clock.interval()
    assert interval.phases_s["forward"] == 2.0
    assert interval.images_per_s(64) == pytest.approx(3 * 64 / (3 * 8.0 + 102.0))


def test_recent_steps_reach_back_over_readings_and_take_nothing_from_them(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    for step, forward_s in enumerate([50.0, 1.0, 2.0]):
        one_step(clock, timer, step, forward_s)
    clock.interval()
    one_step(clock, timer, 4, 99.0)
    recent = clock.recent(3)
    assert (recent.steps, recent.phases_s["forward"]) == (3, 2.0)
    assert clock.recent(100).steps == 4
    assert clock.interval().phases_s["forward"] == 99.0


def test_interval_without_steps_has_no_figures(timer: FakeTimer) -> None:
    interval = PhaseClock(CPU).interval()
    assert interval.steps == 0
    assert math.isnan(interval.images_per_s(32))
    assert interval.phases_s.keys() == KEYS
    assert all(math.isnan(value) for value in interval.phases_s.values())


def test_nothing_waits_for_the_device_between_readings(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    for step in range(100):
        one_step(clock, timer, step)
    assert timer.waits == 0
    clock.interval()
    assert timer.waits == 1


def test_marks_are_bounded_without_any_reading(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    for step in range(3000):
        one_step(clock, timer, step)
    assert len(timer.moments) < 256 * 8
    times = clock.summary()
    assert times.steps == 3000
    assert times.phases_s["backward"] == 3.0


def test_a_sign_of_life_within_a_phase_marks_nothing(timer: FakeTimer) -> None:
    """An evaluation may have a hundred thousand batches, and marks are events of the GPU."""
    told: list[str] = []
    clock = PhaseClock(CPU, on_enter=lambda step, phase: told.append(phase))
    one_step(clock, timer, 1)
    before = len(timer.moments)
    for _ in range(1000):
        clock.enter("eval")
        timer.now_s += 0.125
    assert told.count("eval") == 1000
    assert len(timer.moments) == before + 1
    assert clock.summary().outside_s["eval"] == 125.0


def test_watchdog_is_told_step_and_phase(timer: FakeTimer) -> None:
    told: list[tuple[int, str]] = []
    clock = PhaseClock(CPU, on_enter=lambda step, phase: told.append((step, phase)))
    one_step(clock, timer, 7)
    clock.enter("eval")
    names = ["data", "forward", "backward", "exchange", "optimizer", "eval"]
    assert told == [(7, name) for name in names]


def test_throughput_is_the_spread_of_steps_after_warm_up(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    for step in range(5):
        one_step(clock, timer, step, forward_s=1000.0)
    for step in range(5, 50):
        one_step(clock, timer, step)
    times = clock.summary()
    throughput = times.throughput(batch_global=100)
    assert throughput["steps_measured"] == 45
    assert throughput["images_per_s"] == pytest.approx({"median": 10.0, "p5": 10.0, "p95": 10.0, "mean": 10.0})
    assert "at least 5" in throughput["warmup_rule"]


def test_throughput_of_no_steps_is_not_a_number(timer: FakeTimer) -> None:
    figures = PhaseClock(CPU).summary().throughput(32)["images_per_s"]
    assert all(math.isnan(value) for value in figures.values())


def test_first_step_after_a_pause_is_left_out(timer: FakeTimer) -> None:
    clock = PhaseClock(CPU)
    for step in range(20):
        one_step(clock, timer, step)
    clock.enter("checkpoint")
    timer.now_s += 5.0
    one_step(clock, timer, 20, forward_s=40.0)
    one_step(clock, timer, 21)
    step_s = clock.summary().step_s
    assert len(step_s) == 22 - 5 - 1
    assert step_s.max() == pytest.approx(10.0)


@settings(deadline=None)
@given(paused=st.lists(st.booleans(), max_size=800))
def test_warm_up_rule(paused: list[bool]) -> None:
    flags = np.array(paused, dtype=bool)
    kept = after_warmup(flags)
    steps = len(paused)
    assert (len(kept) > 0) == (steps > 0)
    assert all(index >= min(5, steps // 2) for index in kept)
    if steps >= 10 and not flags.any():
        assert len(kept) == steps - min(50, max(5, math.ceil(steps / 10)))
    if flags[kept].any():
        assert flags[min(50, max(5, math.ceil(steps / 10)), steps // 2) :].all(), "kept though there was better"


def test_unknown_phase_is_refused() -> None:
    with pytest.raises(KeyError, match="bakward"):
        PhaseClock(CPU).enter("bakward")  # type: ignore[arg-type]


def test_host_timer_reads_the_system_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([1_000_000_000, 1_250_000_000, 1_250_000_000, 3_000_000_000])
    next_moment: Callable[[], Any] = lambda: next(moments)  # noqa: E731
    monkeypatch.setattr("hpctrain.metrics.clock.time.perf_counter_ns", next_moment)
    clock = PhaseClock(CPU)
    clock.step(0)
    clock.enter("data")
    clock.enter("forward")
    clock.end_step()
    interval = clock.interval()
    assert (interval.phases_s["data"], interval.phases_s["forward"]) == (0.0, 1.75)
    assert interval.seconds == 2.0
