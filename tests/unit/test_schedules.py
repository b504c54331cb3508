"""Learning-rate schedules: exact at the boundaries, bounded and monotone between them."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.schedules import Schedule


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 500))
    warmup = draw(st.integers(0, total))
    peak = draw(st.floats(1e-4, 10.0))
    return Schedule(
        kind=draw(st.sampled_from(["constant", "step", "cosine", "poly"])),
        peak=peak,
        total_steps=total,
        warmup_steps=warmup,
        start=peak * draw(st.floats(0.0, 1.0)),
        final=peak * draw(st.floats(0.0, 1.0)),
        milestones=tuple(sorted(draw(st.lists(st.integers(warmup + 1, total + 1), max_size=3, unique=True)))),
        gamma=draw(st.floats(0.05, 1.0)),
        power=draw(st.floats(0.5, 3.0)),
    )


@settings(deadline=None)
@given(schedules())
def test_rates_rise_to_the_peak_and_fall_after_it(schedule: Schedule) -> None:
    rates = [schedule.lr_at(step) for step in range(schedule.total_steps + 2)]
    warmup = schedule.warmup_steps
    slack = 1e-12 * schedule.peak
    assert all(0.0 <= rate <= schedule.peak + slack for rate in rates)
    assert all(late >= early - slack for early, late in pairwise(rates[: warmup + 1]))
    assert all(late <= early + slack for early, late in pairwise(rates[warmup:]))


@settings(deadline=None)
@given(schedules())
def test_boundaries_are_exact(schedule: Schedule) -> None:
    warmup, total = schedule.warmup_steps, schedule.total_steps
    if warmup > 0:
        assert schedule.lr_at(0) == schedule.start
    assert schedule.lr_at(warmup) == pytest.approx(schedule.peak, rel=1e-15)
    if schedule.kind in ("cosine", "poly") and warmup < total:
        assert schedule.lr_at(total) == pytest.approx(schedule.final, rel=1e-12, abs=1e-15 * schedule.peak)
        assert schedule.lr_at(total + 7) == schedule.lr_at(total)


@settings(deadline=None)
@given(schedules().filter(lambda schedule: schedule.kind in ("constant", "cosine") and schedule.total_steps > 20))
def test_no_jump_is_larger_than_its_share_of_the_way(schedule: Schedule) -> None:
    """From step to step the rate moves by at most the steepest slope of a line or of half a cosine."""
    down = schedule.total_steps - schedule.warmup_steps
    slopes = [schedule.peak / max(1, schedule.warmup_steps), math.pi / 2 * schedule.peak / max(1, down)]
    rates = [schedule.lr_at(step) for step in range(schedule.total_steps)]
    jumps = [abs(b - a) for a, b in pairwise(rates)]
    assert max(jumps) <= max(slopes) * (1 + 1e-9)


def test_warm_up_adds_the_same_each_step() -> None:
    """Goyal et al. 2017: from 0.1 to 3.2 in 5 epochs at a batch of 8,192 (156 steps an epoch)."""
    schedule = Schedule(kind="step", peak=3.2, start=0.1, warmup_steps=780, total_steps=14040, milestones=(4680, 9360))
    assert schedule.lr_at(0) == 0.1
    assert schedule.lr_at(390) == pytest.approx(1.65)
    assert schedule.lr_at(780) == 3.2
    increments = {round(schedule.lr_at(s + 1) - schedule.lr_at(s), 12) for s in range(780)}
    assert len(increments) == 1


def test_step_falls_at_the_milestone_itself() -> None:
    schedule = Schedule(kind="step", peak=1.0, total_steps=100, milestones=(30, 60), gamma=0.1)
    assert [schedule.lr_at(s) for s in (29, 30, 59, 60)] == pytest.approx([1.0, 0.1, 0.1, 0.01])


def test_cosine_is_half_way_in_the_middle_and_moves_in_the_last_step() -> None:
    schedule = Schedule(kind="cosine", peak=1.0, final=0.2, total_steps=110, warmup_steps=10)
    assert schedule.lr_at(60) == pytest.approx(0.6)
    assert schedule.lr_at(109) > 0.2


def test_poly_is_the_published_formula() -> None:
    schedule = Schedule(kind="poly", peak=4.8, total_steps=8040, power=2.0)
    assert schedule.lr_at(2010) == pytest.approx(4.8 * 0.75**2)


def test_warm_up_may_come_down_to_a_peak_below_its_start() -> None:
    """A recipe for 256 GPUs run on one: the start of the warm-up is not scaled, the peak is."""
    schedule = Schedule(kind="constant", peak=0.0125, start=0.1, warmup_steps=4, total_steps=10)
    rates = [schedule.lr_at(step) for step in range(6)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == 0.0125
