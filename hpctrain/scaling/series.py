"""The arithmetic of scaling: which runs make a series, and speed-up and efficiency of its sizes.

X(n) is the rate on n units (images/s; units are workers or nodes), b the units of the baseline:

    speed-up    S(n) = X(n) / X(b)
    efficiency  E(n) = S(n) · b / n

Strong scaling holds the work of a step constant (the global batch), weak scaling that of a worker. Both have the
same formula in rates: for strong scaling a given work takes T(n) = work / X(n), so that E(n) = T(b) b / (T(n) n); for
weak scaling E(n) is the quotient of the rates a unit. The rate of a size is the median over its repeats of each
run's own median over its steps; the spread is the 5th and 95th percentile over the repeats, interpolated linearly as
those of a record are. Every repeat counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpctrain.errors import UserError
from hpctrain.metrics.spread import Spread, robust_deviation
from hpctrain.scaling.runs import Run, Size

#: A repeat is told as an outlier when it is this many standard deviations off, by the median absolute deviation
#: (Iglewicz and Hoaglin 1993, the modified z-score), and further off than ``_OUTLIER_SHARE`` of the median.
_OUTLIER_SCORE, _OUTLIER_SHARE = 3.5, 0.05
#: Fewer repeats cannot tell which of them is off.
_OUTLIER_REPEATS = 3

Unit = Literal["workers", "nodes"]


@dataclass(frozen=True, slots=True)
class Point:
    """All runs of one size in a series. Rates are images/s; ``p5`` and ``p95`` are those over the repeats."""

    size: Size
    runs: tuple[Run, ...]
    rate: float
    p5: float
    p95: float

    @classmethod
    def of(cls, size: Size, runs: Sequence[Run]) -> Point:
        rates = Spread.of([run.rate for run in runs])
        return cls(size, tuple(runs), rates.median, rates.p5, rates.p95)

    def units(self, unit: Unit) -> int:
        """Workers or nodes of this size."""
        return self.size.workers if unit == "workers" else self.size.nodes


@dataclass(frozen=True, slots=True)
class Baseline:
    """What the sizes of a series are held against. ``wanted``: it is one worker, or one node, as asked for."""

    unit: Unit
    point: Point
    wanted: bool

    def speed_up(self, point: Point) -> float:
        """S(n): times the rate of the baseline."""
        return point.rate / self.point.rate

    def efficiency(self, point: Point) -> float:
        """E(n): the share of the rate that as many times the units would ideally give."""
        return self.speed_up(point) * self.point.units(self.unit) / point.units(self.unit)

    def applies(self, point: Point) -> bool:
        """Whether ``point`` is made of such units: nodes compare only where each has as many workers."""
        return self.unit == "workers" or _per_node(point.size) == _per_node(self.point.size)


@dataclass(frozen=True, slots=True)
class Series:
    """Runs at several sizes. ``held`` says what is constant: samples a step (strong) or a worker and step (weak)."""

    mode: Literal["strong", "weak"]
    held: int
    points: tuple[Point, ...]
    baselines: tuple[Baseline, ...]


def find_series(runs: Sequence[Run]) -> tuple[Series, ...]:
    """All strong, then all weak series in ``runs``, recognised by their plans; a run may be in several.

    Raises UserError when there are fewer than two sizes, no series, or two settings for one place of a series.
    """
    if len({run.size.workers for run in runs}) < 2:
        raise UserError(
            f"all runs have {runs[0].size.workers} workers ({runs[0].path}), but scaling needs at least two sizes: "
            "add runs with another number of workers"
        )
    strong = [_series("strong", held, group) for held, group in _grouped(runs, lambda run: run.batch_global)]
    weak = [_series("weak", batch[0] * batch[1], group) for batch, group in _grouped(runs, lambda run: run.batch)]
    found = tuple(series for series in (*strong, *weak) if series is not None)
    if not found:
        batches = ", ".join(f"{run.size.workers} x {run.batch_global // run.size.workers}" for run in runs)
        raise UserError(
            f"no two sizes have the same global batch or the same batch a worker (workers x batch: {batches}): "
            "repeat the runs with one of them held constant"
        )
    return found


def left_out(runs: Iterable[Run], found: Iterable[Series]) -> list[Run]:
    """Those of ``runs`` that no series of ``found`` takes."""
    taken = {run.path for series in found for point in series.points for run in point.runs}
    return [run for run in runs if run.path not in taken]


def outliers(point: Point) -> list[tuple[Run, float]]:
    """Repeats far from the others of their size, each with its deviation from the median as a share of that."""
    if len(point.runs) < _OUTLIER_REPEATS:
        return []
    deviations = [(run, run.rate - point.rate) for run in point.runs]
    sigma = robust_deviation([run.rate for run in point.runs])
    return [
        (run, deviation / point.rate)
        for run, deviation in deviations
        if abs(deviation) > _OUTLIER_SCORE * sigma and abs(deviation) > _OUTLIER_SHARE * point.rate
    ]


def _grouped(runs: Iterable[Run], key: Callable[[Run], Any]) -> list[tuple[Any, list[Run]]]:
    groups: dict[Any, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return sorted(groups.items())


def _series(mode: Literal["strong", "weak"], held: int, runs: Sequence[Run]) -> Series | None:
    """The series that ``runs`` make, or None where they are all of one size."""
    if len({run.size.workers for run in runs}) < 2:
        return None
    for size, repeats in _grouped(runs, lambda run: run.size):
        other = next((run for run in repeats if run.batch != repeats[0].batch), None)
        if other is not None:
            raise UserError(
                f"{repeats[0].path} and {other.path} have {size.workers} workers and the global batch {held}, but "
                "differ in train.batch_per_worker and train.accumulation: leave one of them out"
            )
    points = tuple(Point.of(size, repeats) for size, repeats in _grouped(runs, lambda run: run.size))
    return Series(mode, held, points, _baselines(points))


def _baselines(points: Sequence[Point]) -> tuple[Baseline, ...]:
    """Against one worker, and against one node where sizes compare by nodes; the smallest stands in for either."""
    worker = Baseline("workers", points[0], points[0].size.workers == 1)
    per_node = _per_node(points[-1].size)
    whole = [point for point in points if _per_node(point.size) == per_node]
    node = Baseline("nodes", whole[0], whole[0].size.nodes == 1)
    return (worker, node) if len(whole) > 1 else (worker,)


def _per_node(size: Size) -> float:
    """Workers a node; a fraction where the nodes differ."""
    return size.workers / size.nodes
