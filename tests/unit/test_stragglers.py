"""Who holds the others up: named with the phase, once; never for noise; at two ranks as at a thousand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.metrics.stragglers import StragglerWatch, find_stragglers, stragglers_of
from hpctrain.topology.phases import OWN_PHASES

USUAL = np.array([0.01, 0.1, 0.2, 0.02])
FORWARD, BACKWARD = OWN_PHASES.index("forward"), OWN_PHASES.index("backward")

worlds = st.sampled_from([2, 3, 4, 8, 64])
seeds = st.integers(0, 2**32 - 1)


def ranks(world_size: int, noise: float = 0.0, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """Seconds of equal ranks, each figure off by up to ``noise`` as a fraction."""
    generator = np.random.default_rng(seed)
    return scale * USUAL * (1 + noise * generator.uniform(-1, 1, (world_size, len(OWN_PHASES))))


@settings(deadline=None)
@given(worlds, seeds, st.floats(0, 0.02), st.floats(0.05, 1e3), st.data())
def test_a_rank_made_30_per_cent_slower_is_named(
    world_size: int, seed: int, noise: float, scale: float, data: st.DataObject
) -> None:
    slow = data.draw(st.integers(0, world_size - 1))
    seconds = ranks(world_size, noise, seed, scale)
    seconds[slow] = seconds[slow] * 1.3
    (found,) = find_stragglers(seconds)
    assert found.rank == slow
    assert found.factor == pytest.approx(1.3, rel=0.05)


@settings(deadline=None)
@given(worlds, seeds, st.floats(0, 0.08), st.floats(1e-6, 1e3))
def test_noise_names_nobody(world_size: int, seed: int, noise: float, scale: float) -> None:
    assert not find_stragglers(ranks(world_size, noise, seed, scale))


@settings(deadline=None)
@given(worlds, seeds)
def test_steps_of_a_millisecond_name_nobody(world_size: int, seed: int) -> None:
    """Whatever their ratios: work is 0.99 ms here, at most doubled, and less than 2 ms apart."""
    seconds = ranks(world_size, 1.0, seed, scale=0.003)
    assert not find_stragglers(seconds)


@settings(deadline=None)
@given(worlds, st.sampled_from(range(len(OWN_PHASES))), seeds)
def test_the_phase_is_the_one_that_the_difference_is_in(world_size: int, phase: int, seed: int) -> None:
    seconds = ranks(world_size, 0.02, seed)
    seconds[-1, phase] += 0.15
    (found,) = find_stragglers(seconds)
    assert (found.rank, found.phase) == (world_size - 1, OWN_PHASES[phase])
    assert found.own_s - found.peers_s == pytest.approx(0.15, abs=0.02)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_the_slow_ones_are_named_up_to_half_of_the_ranks(slow: int, others: int) -> None:
    order = np.random.default_rng(slow * 10 + others).permutation(slow + others)
    seconds = ranks(slow + others)
    seconds[order[:slow]] *= 1.5
    named = {found.rank for found in find_stragglers(seconds)}
    assert named == (set(order[:slow].tolist()) if slow <= others else set())


@settings(deadline=None)
@given(st.sampled_from([8, 64, 512]), seeds)
def test_ranks_that_all_differ_are_compared_with_that_spread(world_size: int, seed: int) -> None:
    """With many ranks whose work differs anyway (pictures of other sizes), 25 % more is nothing special."""
    even = np.linspace(0.8, 1.2, world_size)[:, None] * USUAL
    assert not find_stragglers(np.random.default_rng(seed).permutation(even))


@pytest.mark.parametrize("work", [[0.1], [0.1, float("nan")], [0.0, 0.0]])
def test_without_figures_of_several_ranks_there_is_no_judgement(work: list[float]) -> None:
    assert not find_stragglers(np.array([[seconds, 0, 0, 0] for seconds in work]))


def slowed(rank: int, factor: float, world_size: int = 4) -> np.ndarray:
    seconds = ranks(world_size)
    seconds[rank, FORWARD] += (factor - 1) * USUAL.sum()
    return seconds


def test_it_is_told_when_it_begins_and_when_it_ends() -> None:
    watch = StragglerWatch(["n1", "n1", "n2", "n2"])
    assert watch.judge(ranks(4), 1, 10) == []
    assert watch.judge(slowed(3, 1.3), 11, 20) == [
        "rank 3 on host n2 holds the others up: its own work takes 429 ms a step, 1.30 times that of the others "
        "(330 ms), most of the difference in forward"
    ]
    assert watch.judge(slowed(3, 1.4), 21, 30) == []
    assert watch.judge(slowed(3, 1.15), 31, 40) == [], "close to the limit it is neither told again nor forgotten"
    (straggler,) = watch.slow
    assert straggler.to_line() == {
        "rank": 3, "host": "n2", "phase": "forward", "factor": pytest.approx(1.4), "first_step": 11, "last_step": 40,
    }  # fmt: skip
    assert watch.judge(ranks(4), 41, 50) == [
        "rank 3 on host n2 holds nobody up any more: it was slow from step 11 to 40, up to 1.40 times the others, "
        "mostly in forward"
    ]
    assert watch.slow == ()
    assert watch.judge(ranks(4), 51, 60) == []


def test_one_may_take_the_place_of_another() -> None:
    watch = StragglerWatch(["n1", "n2"])
    watch.judge(slowed(0, 1.5, 2), 1, 5)
    ended, begun = watch.judge(slowed(1, 1.5, 2), 6, 10)
    assert ended.startswith("rank 0 on host n1 holds nobody up any more: it was slow from step 1 to 5, up to 1.50")
    assert begun.startswith("rank 1 on host n2 holds the others up")


def test_a_run_has_each_straggler_as_it_was_last_seen() -> None:
    watch, lines = StragglerWatch(["n1", "n2"]), []
    for step, factor in ((10, 1.0), (20, 1.5), (30, 1.8), (40, 1.0), (50, 1.3)):
        watch.judge(slowed(1, factor, 2), step - 9, step)
        lines.append({"step": step, **({"stragglers": [s.to_line() for s in watch.slow]} if watch.slow else {})})
    assert ["stragglers" in line for line in lines] == [False, True, True, False, True]
    common = {"rank": 1, "host": "n2", "phase": "forward"}
    assert stragglers_of(lines) == [
        {**common, "factor": pytest.approx(1.8), "first_step": 11, "last_step": 30},
        {**common, "factor": pytest.approx(1.3), "first_step": 41, "last_step": 50},
    ]
    assert stragglers_of([]) == []
