"""A scaling report as values: the series of some runs, what must be known to read them, and both as JSON or CSV.

How it looks on a terminal is in ``render``; the arithmetic is in ``series``.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpctrain.metrics.layout import RECORD_FILE
from hpctrain.scaling.comparable import gpu_kinds, refuse_differences, remarks
from hpctrain.scaling.runs import Run, read_runs
from hpctrain.scaling.series import Baseline, Point, Series, find_series, left_out, outliers

SCHEMA = 1

#: What the figures mean; printed under every table and kept in the JSON.
DEFINITIONS = (
    "images/s, X: of a run, the median over the steps of its last launch after warm-up (see the record's warm-up "
    "rule); of a size, the median over its runs, with their 5th and 95th percentile beside it. No run is left out of "
    "either.",
    "speed-up S(n) = X(n) / X(b) on n units against b of the baseline; efficiency E(n) = S(n) b / n, where a unit is a "
    "worker ({worker}) or a node with all its workers.",
    "strong scaling: the global batch is constant, so that E(n) = T(b) b / (T(n) n) for the time T of given work; "
    "weak scaling: the batch of a worker is constant, so that E(n) compares the rates of a unit.",
)
_ABOVE_ONE = 1.005


@dataclass(frozen=True, slots=True)
class ScalingReport:
    """Everything a report says. ``worker`` is what a worker is here: "GPU", or "rank" on CPUs."""

    series: tuple[Series, ...]
    machine: str
    worker: str
    remarks: tuple[str, ...]

    @property
    def definitions(self) -> tuple[str, ...]:
        """What the figures mean, in sentences."""
        return tuple(text.format(worker=f"one {self.worker}") for text in DEFINITIONS)


def make_report(paths: Sequence[Path], skip_unfinished: bool = False) -> ScalingReport:
    """The report on the runs in ``paths``, run directories or folders of them.

    Raises UserError when a run cannot be read, does not compare with the others, or has not ended and may not be
    skipped, and when the runs make no series.
    """
    runs, unfinished = read_runs(paths, skip_unfinished)
    refuse_differences(runs)
    found = find_series(runs)
    gpu = gpu_kinds(runs[0])
    cpu = (runs[0].record.provenance.get("cpu") or {}).get("model") or "unknown CPU"
    skipped = [f"{path} is left out: it has no {RECORD_FILE}, so its training has not ended" for path in unfinished]
    notes = [*skipped, *_about_series(found), *_about_runs(runs, found), *remarks(runs)]
    engines = sorted({run.record.engine.name for run in runs})
    data = runs[0].record.data
    machine = (
        f"{gpu or f'CPUs ({cpu})'}; {runs[0].config.model.name}, {runs[0].config.data.image_size} px, "
        f"{'real' if data.real else 'synthetic'} pictures by {data.loader}, engine {' and '.join(engines)}"
    )
    return ScalingReport(found, machine, "GPU" if gpu else "rank", tuple(dict.fromkeys(notes)))


def _about_series(found: Sequence[Series]) -> Iterator[str]:
    for series in found:
        worker = series.baselines[0]
        if not worker.wanted:
            yield f"no run of {name_of(series)} has one worker: its efficiency is against the smallest, {named(worker)}"
        if len(series.baselines) == 1 and series.points[-1].size.nodes > 1:
            yield f"no two sizes of {name_of(series)} have as many workers a node: none is held against a node"
        for node in series.baselines[1:]:
            if not node.wanted:
                yield (
                    f"no run of {name_of(series)} is on one such node: "
                    f"its efficiency by nodes is against the smallest, {named(node)}"
                )
        for baseline in series.baselines:
            for point in series.points:
                if baseline.applies(point) and (efficiency := baseline.efficiency(point)) > _ABOVE_ONE:
                    yield (
                        f"{name_of(series)}, {point.size.workers} workers: {efficiency:.1%} is above 100 %: see that "
                        f"the baseline, {baseline.point.runs[0].path}, ran undisturbed and at its best"
                    )


def _about_runs(runs: Sequence[Run], found: Sequence[Series]) -> Iterator[str]:
    for point in (point for series in found for point in series.points):
        for run, deviation in outliers(point):
            yield f"{run.path} is {deviation:+.1%} off the median of its size; it is counted all the same"
    for run in left_out(runs, found):
        yield f"{run.path} shares its global batch and its batch a worker with no other size, and is in no table"


def name_of(series: Series) -> str:
    """The series in words."""
    return f"{series.mode} scaling with {series.held:,} samples a {'step' if series.mode == 'strong' else 'worker'}"


def named(baseline: Baseline) -> str:
    """The baseline in words, as in "1 node" or "16 workers"."""
    units = baseline.point.units(baseline.unit)
    return f"{units:,} {baseline.unit if units > 1 else baseline.unit.removesuffix('s')}"


def to_record(report: ScalingReport) -> dict[str, Any]:
    """The report as JSON values; ``points`` hold each run's own rates."""
    return {
        "schema": SCHEMA,
        "machine": report.machine,
        "worker": report.worker,
        "definitions": list(report.definitions),
        "remarks": list(report.remarks),
        "series": [
            {
                "mode": series.mode,
                "held": series.held,
                "baselines": {baseline.unit: _baseline_record(baseline) for baseline in series.baselines},
                "points": [_point_record(series, point) for point in series.points],
            }
            for series in report.series
        ],
    }


def _baseline_record(baseline: Baseline) -> dict[str, Any]:
    point = baseline.point
    return {"size": asdict(point.size), "wanted": baseline.wanted, "run": str(point.runs[0].path)}


def _point_record(series: Series, point: Point) -> dict[str, Any]:
    batch_per_worker, accumulation = point.runs[0].batch
    return {
        **asdict(point.size),
        "batch_per_worker": batch_per_worker,
        "accumulation": accumulation,
        "batch_global": point.runs[0].batch_global,
        "images_per_s": {"median": point.rate, "p5": point.p5, "p95": point.p95},
        "against": {
            baseline.unit: {"speed_up": baseline.speed_up(point), "efficiency": baseline.efficiency(point)}
            for baseline in series.baselines
            if baseline.applies(point)
        },
        "runs": [
            {"run": str(run.path), "images_per_s": run.record.throughput.images_per_s.model_dump()}
            for run in point.runs
        ],
    }


def to_csv(report: ScalingReport) -> str:
    """A line for each size of each series. Efficiencies are fractions; an empty cell: not to be had."""
    lines = []
    for series in to_record(report)["series"]:
        for point in series["points"]:
            line = {"mode": series["mode"], "workers": point["workers"], "nodes": point["nodes"]}
            line |= {key: point[key] for key in ("batch_per_worker", "accumulation", "batch_global")}
            line |= {"runs": len(point["runs"])}
            line |= {f"images_per_s_{key}": value for key, value in point["images_per_s"].items()}
            for unit in ("workers", "nodes"):
                against = point["against"].get(unit, {"speed_up": None, "efficiency": None})
                baseline = series["baselines"].get(unit)
                line |= {f"{key}_by_{unit}": value for key, value in against.items()}
                line |= {f"baseline_{unit}": baseline["size"][unit] if baseline else None}
            lines.append(line)
    return _csv(lines)


def runs_csv(report: ScalingReport) -> str:
    """A line for each run in any series, with the rates of its own record."""
    runs = {run.path: run for series in report.series for point in series.points for run in point.runs}
    return _csv(
        {
            "run": str(run.path),
            **asdict(run.size),
            "batch_per_worker": run.batch[0],
            "accumulation": run.batch[1],
            "batch_global": run.batch_global,
            **{f"images_per_s_{key}": value for key, value in run.record.throughput.images_per_s.model_dump().items()},
            "steps_measured": run.steps_measured,
        }
        for run in runs.values()
    )


def _csv(lines: Any) -> str:
    lines = list(lines)
    stream = io.StringIO()
    # Records may be of versions that knew more rates than others.
    fields = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(stream, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return stream.getvalue()
