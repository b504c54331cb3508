"""Speed-up and efficiency as arithmetic: what is exact for ideal runs, and what nothing may depend on."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.metrics.record import Record
from hpctrain.scaling.runs import Run
from hpctrain.scaling.series import Baseline, Series, find_series, left_out, outliers
from tests.unit.test_record import RECORD

rates = st.floats(1e-3, 1e7)
sizes = st.lists(st.integers(1, 512), min_size=2, max_size=6, unique=True)


def made(name: str, workers: int, rate: float, *, nodes: int = 1, batch: int = 8, accumulation: int = 1) -> Run:
    plan = RECORD["plan"] | {
        "workers": workers, "nodes": nodes, "batch_per_worker": batch, "batch_global": workers * batch * accumulation
    }  # fmt: skip
    train = {"batch_per_worker": batch, "accumulation": accumulation}
    config = Config.model_validate({"model": {"name": "dense"}, "train": train})
    return Run(Path(name), Record.model_validate({"schema": 1, **RECORD, "plan": plan}), config, rate)


def only(series: tuple[Series, ...]) -> Series:
    assert len(series) == 1
    return series[0]


def efficiencies(series: Series, unit: str = "workers") -> dict[Any, float]:
    baseline = next(baseline for baseline in series.baselines if baseline.unit == unit)
    return {point.size: baseline.efficiency(point) for point in series.points if baseline.applies(point)}


@given(sizes, rates, st.integers(1, 4))
def test_efficiency_of_ideal_runs_is_one(workers: list[int], rate: float, repeats: int) -> None:
    runs = [made(f"{n}-{r}", n, n * rate) for n in workers for r in range(repeats)]
    series = only(find_series(runs))
    assert series.mode == "weak"
    assert efficiencies(series) == pytest.approx(dict.fromkeys(efficiencies(series), 1.0))
    worker = series.baselines[0]
    assert [worker.speed_up(point) for point in series.points] == pytest.approx(
        [point.size.workers / min(workers) for point in series.points]
    )


@given(st.integers(0, 6), rates, st.floats(0.1, 1.0))
def test_strong_scaling_is_time_at_the_baseline_over_time_by_workers(doublings: int, rate: float, loss: float) -> None:
    workers = [2**n for n in range(doublings + 2)]
    work = 2 ** (doublings + 1)
    runs = [made(str(n), n, rate * n**loss, batch=work // n) for n in workers]
    series = only(find_series(runs))
    assert (series.mode, series.held) == ("strong", work)
    seconds = {run.size: work / run.rate for run in runs}
    first = runs[0].size
    expected = {run.size: seconds[first] / (seconds[run.size] * run.size.workers) for run in runs}
    assert efficiencies(series) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(1, 4), rates), min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_order_of_runs_does_not_matter(found: list[tuple[int, float]], shuffler: random.Random) -> None:
    runs = [made("first", 5, 1.0), *(made(str(at), n, rate) for at, (n, rate) in enumerate(found))]
    in_order = only(find_series(runs))
    shuffler.shuffle(runs)
    shuffled = only(find_series(runs))
    assert efficiencies(in_order) == efficiencies(shuffled)
    assert [(p.rate, p.p5, p.p95) for p in in_order.points] == [(p.rate, p.p5, p.p95) for p in shuffled.points]


@given(st.lists(rates, min_size=1, max_size=9), rates, st.floats(0.01, 100))
def test_a_size_is_the_median_of_its_repeats_and_scales_with_them(
    repeats: list[float], other: float, factor: float
) -> None:
    def pair(scale: float) -> Series:
        runs = [made(str(at), 1, scale * rate) for at, rate in enumerate(repeats)]
        return only(find_series([*runs, made("other", 2, scale * other)]))

    series = pair(1.0)
    assert series.points[0].rate == pytest.approx(median(repeats))
    assert len(series.points[0].runs) == len(repeats)
    assert series.points[0].p5 <= series.points[0].rate * (1 + 1e-9)
    assert series.points[0].rate <= series.points[0].p95 * (1 + 1e-9)
    assert efficiencies(pair(factor)) == pytest.approx(efficiencies(series))


@given(st.lists(st.integers(1, 16), min_size=2, max_size=5, unique=True), st.integers(1, 8), rates)
def test_nodes_and_workers_agree_where_all_nodes_are_full(nodes: list[int], per_node: int, rate: float) -> None:
    series = only(find_series([made(str(n), n * per_node, rate / n, nodes=n) for n in nodes]))
    assert efficiencies(series, "nodes") == pytest.approx(efficiencies(series, "workers"))


def test_strong_and_weak_in_one_folder_share_their_baseline() -> None:
    weak = [made(f"weak{n}", n, 100.0 * n, batch=64) for n in (1, 2, 4)]
    strong = [made(f"strong{n}", n, 90.0 * n, batch=64 // n) for n in (2, 4)]
    first, second = find_series([*weak, *strong])
    assert [(some.mode, some.held, len(some.points)) for some in (first, second)] == [
        ("strong", 64, 3),
        ("weak", 64, 3),
    ]
    assert list(efficiencies(first).values()) == pytest.approx([1.0, 0.9, 0.9])
    assert list(efficiencies(second).values()) == pytest.approx([1.0, 1.0, 1.0])


def test_accumulation_counts_as_work_of_a_step() -> None:
    strong = only(find_series([made("a", 1, 10, batch=8, accumulation=4), made("b", 4, 30, batch=8)]))
    assert (strong.mode, strong.held) == ("strong", 32)
    weak = only(find_series([made("a", 1, 10, accumulation=4), made("b", 4, 30, accumulation=4)]))
    assert (weak.mode, weak.held) == ("weak", 32)


def baseline(series: Series, unit: str) -> Baseline | None:
    return next((found for found in series.baselines if found.unit == unit), None)


def test_the_smallest_stands_in_for_a_missing_baseline() -> None:
    series = only(find_series([made("a", 16, 100.0, nodes=2), made("b", 32, 160.0, nodes=4)]))
    workers, nodes = baseline(series, "workers"), baseline(series, "nodes")
    assert workers is not None and nodes is not None
    assert (workers.wanted, workers.point.size.workers) == (False, 16)
    assert (nodes.wanted, nodes.point.size.nodes) == (False, 2)
    assert list(efficiencies(series).values()) == pytest.approx([1.0, 0.8])


def test_a_node_compares_with_nodes_of_as_many_workers() -> None:
    runs = [made("1", 1, 10, nodes=1), made("8", 8, 70, nodes=1), made("16", 16, 126, nodes=2)]
    by_node = efficiencies(only(find_series(runs)), "nodes")
    assert {size.workers: value for size, value in by_node.items()} == pytest.approx({8: 1.0, 16: 0.9})
    assert baseline(only(find_series(runs[:2])), "nodes") is None


def test_outliers_are_told_and_counted() -> None:
    off = made("off", 1, 80.0)
    runs = [made("a", 1, 100.0), made("b", 1, 101.0), off, made("c", 2, 200.0)]
    point = only(find_series(runs)).points[0]
    assert outliers(point) == [(off, pytest.approx(-0.2))]
    assert off in point.runs and point.rate == 100.0 and point.p5 < 100.0


def test_two_repeats_or_small_deviations_make_no_outlier() -> None:
    def first(*values: float) -> list[Any]:
        runs = [made(str(at), 1, value) for at, value in enumerate(values)]
        return outliers(only(find_series([*runs, made("other", 2, 1.0)])).points[0])

    assert first(100.0, 50.0) == []
    assert first(100.0, 100.01, 99.0) == []


def test_runs_of_no_series_are_told() -> None:
    lonely = made("lonely", 4, 10.0, batch=7)
    runs = [made("a", 1, 10.0), made("b", 2, 10.0), lonely]
    assert left_out(runs, find_series(runs)) == [lonely]


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([partial(made, "a", 2, 1.0), partial(made, "b", 2, 1.0, nodes=2)], r"all runs have 2 workers \(a\).*add runs"),
        (
            [partial(made, "a", 1, 1.0, batch=8), partial(made, "b", 2, 1.0, batch=7)],
            r"no two sizes have the same global batch or the same batch a worker \(workers x batch: 1 x 8, 2 x 7\)",
        ),
        (
            [
                partial(made, "a", 1, 1.0, batch=8),
                partial(made, "b", 2, 1.0, batch=4),
                partial(made, "c", 2, 1.0, batch=2, accumulation=2),
            ],
            r"b and c have 2 workers and the global batch 8, but differ in train.batch_per_worker",
        ),
    ],
)
def test_what_makes_no_series_is_refused(runs: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_series([make() for make in runs])
