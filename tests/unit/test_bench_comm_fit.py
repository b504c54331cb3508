"""The α–β fit finds what made the times, is not negative, and says how far the times are from any line."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.bench.comm.fit import fit, fit_line

SIZES = [8 << (2 * power) for power in range(13)]
#: 100 ns to 10 ms a step; 100 GB/s to 10 MB/s
ALPHAS = st.floats(1e-7, 1e-2)
BETAS = st.floats(1e-11, 1e-7)
FACTORS = st.floats(0.5, 2.0)


def times_of(alpha_s: float, beta: float, steps: int, factor: float) -> list[float]:
    return [alpha_s * steps + size * factor * beta for size in SIZES]


@settings(deadline=None)
@given(ALPHAS, BETAS, st.integers(1, 2046), FACTORS)
def test_exact_times_give_their_line_back(alpha_s: float, beta: float, steps: int, factor: float) -> None:
    line = fit_line(SIZES, times_of(alpha_s, beta, steps, factor), steps, factor)
    assert line is not None
    assert line.alpha_s == pytest.approx(alpha_s, rel=1e-6)
    assert line.residual < 1e-6
    # With 2,046 steps of 10 ms, a message of 128 MiB at 100 GB/s is lost in the rounding of its time.
    if beta * factor * SIZES[-1] > 1e-4 * alpha_s * steps:
        assert line.beta_s_per_byte == pytest.approx(beta, rel=1e-4)


@settings(deadline=None)
@given(ALPHAS, BETAS, st.lists(st.floats(0.9, 1.1), min_size=len(SIZES), max_size=len(SIZES)))
def test_noise_of_a_tenth_moves_the_model_by_a_tenth(alpha_s: float, beta: float, noise: list[float]) -> None:
    true = times_of(alpha_s, beta, 2, 1.0)
    line = fit_line(SIZES, [time_s * by for time_s, by in zip(true, noise, strict=True)], 2, 1.0)
    assert line is not None and line.alpha_s >= 0 and line.beta_s_per_byte >= 0
    assert line.residual <= 0.11 and line.worst <= 0.25
    for size, time_s in zip(SIZES, true, strict=True):
        assert line.alpha_s * 2 + size * line.beta_s_per_byte == pytest.approx(time_s, rel=0.25)


@settings(deadline=None)
@given(st.lists(st.floats(1e-6, 1.0), min_size=3, max_size=3), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_no_other_pair_is_better(times: list[float], one: float, other: float) -> None:
    """Also where the best line of all would have a negative α or β."""
    sizes = [8, 1 << 10, 1 << 20]
    line = fit_line(sizes, times, 1, 1.0)
    assert line is not None and line.alpha_s >= 0 and line.beta_s_per_byte >= 0
    rival = max(times) * one + np.array(sizes) * max(times) / 8 * other
    assert line.residual <= np.sqrt(np.mean((rival / np.array(times) - 1) ** 2)) + 1e-9


def test_time_that_falls_with_size_has_no_bandwidth() -> None:
    found = fit([8, 1024], [[2.0, 2.0], [1.0, 1.0]], 2, 1.0)
    assert found is not None
    assert found.line.beta_s_per_byte == 0.0
    assert found.bandwidth_gb_per_s is None
    assert found.line.worst == pytest.approx(0.4)  # α · 2 = 1.2, the best constant for 2 and 1, relatively


def test_the_medians_are_fitted_and_the_rounds_tell_the_spread() -> None:
    rounds = [[time_s * by for by in (1.0, 1.0, 3.0)] for time_s in times_of(1e-5, 1e-9, 2, 1.0)]
    found = fit(SIZES, rounds, 2, 1.0)
    assert found is not None
    assert found.line.alpha_s == pytest.approx(1e-5)
    assert found.bandwidth_gb_per_s == pytest.approx(1.0)
    assert found.alpha_s.median == pytest.approx(1e-5)
    assert found.alpha_s.p95 == pytest.approx(2.8e-5)


def test_one_size_is_no_line() -> None:
    assert fit([64], [[1.0, 2.0]], 2, 1.0) is None
    assert fit_line([64, 64], [1.0, 2.0], 2, 1.0) is None
