"""A scaling report for people: tables and footnotes on a terminal, or as text of a fixed width."""

from __future__ import annotations

import io

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hpctrain.scaling.report import ScalingReport, name_of
from hpctrain.scaling.series import Baseline, Point, Series

TEXT_WIDTH = 100


def render(report: ScalingReport, console: Console | None = None) -> None:
    """Print ``report``: what was measured on what, a table a series, remarks, definitions."""
    console = console or Console(highlight=False)
    console.print(report.machine, markup=False)
    for series in report.series:
        console.print()
        console.print(_table(series, report.worker))
    if report.remarks:
        console.print()
    for remark in report.remarks:
        console.print(f"note: {remark}", markup=False)
    console.print()
    for sentence in report.definitions:
        console.print(sentence, markup=False)


def to_text(report: ScalingReport) -> str:
    """The same as plain text, ``TEXT_WIDTH`` columns wide."""
    stream = io.StringIO()
    render(report, Console(file=stream, width=TEXT_WIDTH, highlight=False, color_system=None))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _table(series: Series, worker: str) -> Table:
    title = f"{name_of(series).capitalize()}{_passes(series)}"
    # Without padding the widest of tables, 1,024 GPUs on 128 nodes, fits into 80 columns.
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False)
    batch = f"batch a\n{worker}" if series.mode == "strong" else "global\nbatch"
    for header in ("nodes", f"{worker}s", batch, "runs", "images/s", "5 to 95 %\nof runs"):
        table.add_column(header, justify="right")
    groups = _groups(series, worker)
    for against, _ in groups:
        table.add_column(f"speed-up\nto {against}", justify="right")
        table.add_column("effi-\nciency", justify="right")
    for point in series.points:
        cells = [cell for _, baseline in groups for cell in _cells(baseline, point)]
        table.add_row(*_facts(series, point), *cells)
    return table


def _groups(series: Series, worker: str) -> list[tuple[str, Baseline]]:
    """The baselines with their names, once where both give the same figures for all sizes."""
    groups = []
    for baseline in series.baselines:
        units, unit = baseline.point.units(baseline.unit), worker if baseline.unit == "workers" else "node"
        groups.append((f"{units:,} {unit}{'s' if units > 1 else ''}", baseline))
    if len(groups) == 2 and all(_cells(groups[0][1], point) == _cells(groups[1][1], point) for point in series.points):
        return [(",\n".join(against for against, _ in groups), groups[0][1])]
    return groups


def _passes(series: Series) -> str:
    """How a weak series' batch is made where it takes several passes; in a strong one that differs by size."""
    batch_per_worker, accumulation = series.points[0].runs[0].batch
    return f" ({batch_per_worker:,} x {accumulation:,})" if series.mode == "weak" and accumulation > 1 else ""


def _facts(series: Series, point: Point) -> list[str]:
    first = point.runs[0]
    batch_per_worker, accumulation = first.batch
    batch = f"{batch_per_worker:,}" + (f" x {accumulation:,}" if accumulation > 1 else "")
    low, high = ((rate / point.rate - 1) * 100 for rate in (point.p5, point.p95))
    return [
        f"{point.size.nodes:,}",
        f"{point.size.workers:,}",
        batch if series.mode == "strong" else f"{first.batch_global:,}",
        f"{len(point.runs):,}",
        f"{point.rate:,.0f}" if point.rate >= 1000 else f"{point.rate:.4g}",
        f"{low:+.1f} {high:+.1f}%" if len(point.runs) > 1 else "–",
    ]


def _cells(baseline: Baseline, point: Point) -> list[str]:
    if not baseline.applies(point):
        return ["–", "–"]
    return [f"{baseline.speed_up(point):.2f}", f"{baseline.efficiency(point):.1%}"]
