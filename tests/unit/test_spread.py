"""Medians, percentiles and the deviation that outliers do not move."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.metrics.spread import Spread, robust_deviation


def test_percentiles_are_interpolated() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of(list(range(101))) == Spread(50.0, 5.0, 95.0)
    assert Spread.of(np.array([1.0, 2.0])) == Spread(1.5, 1.05, 1.95)


def test_the_deviation_of_normal_figures() -> None:
    values = np.random.default_rng(0).normal(7.0, 3.0, 100_000)
    assert robust_deviation(values) == pytest.approx(3.0, rel=0.02)


@given(st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=30), st.floats(-1e9, 1e9))
def test_one_outlier_moves_it_no_further_than_the_others_reach(values: list[float], outlier: float) -> None:
    assert 0 <= robust_deviation([*values, outlier]) <= 1.4827 * (max(values) - min(values))
