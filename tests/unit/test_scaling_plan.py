"""The runs of a series: what each kind of scaling holds constant, and what cannot be held."""

from __future__ import annotations

from math import lcm

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.scaling.plan import plan_series

sizes = st.lists(st.integers(1, 12), min_size=2, max_size=5, unique=True)


def with_batch(batch: int) -> Config:
    return Config.model_validate({"model": {"name": "dense"}, "train": {"batch_per_worker": batch}})


@given(sizes, st.integers(1, 8))
def test_each_kind_holds_its_batch_and_both_share_the_smallest(workers: list[int], multiple: int) -> None:
    config = with_batch(multiple * lcm(*workers))
    weak, strong, both = (plan_series(config, mode, workers) for mode in ("weak", "strong", "both"))
    assert [run.workers for run in weak] == [run.workers for run in strong] == sorted(workers)
    assert {run.batch_per_worker for run in weak} == {config.train.batch_per_worker}
    assert {run.batch_per_worker * run.workers for run in strong} == {config.train.batch_per_worker * min(workers)}
    assert both == sorted({*weak, *strong}) and len(both) == 2 * len(workers) - 1


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="holds the global batch of the smallest size, 32 on 1 workers.*among 3: set"):
        plan_series(with_batch(32), "both", [1, 2, 3])
    assert len(plan_series(with_batch(32), "weak", [1, 2, 3])) == 3


def test_one_size_is_no_series() -> None:
    with pytest.raises(UserError, match="at least two sizes, not only 4 workers: name another"):
        plan_series(with_batch(32), "both", [4, 4])
