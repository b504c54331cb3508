"""A scaling report for people: tables and footnotes on a terminal, or as text of a fixed width."""

from __future__ import annotations

import io

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
    title = name_of(series)
    table = Table(title=title[0].upper() + title[1:], title_justify="left", title_style="bold")
    for header in ("nodes", f"{worker}s", "batch", "global", "runs", "images/s", "5 to 95 %"):
        table.add_column(header, justify="right")
    groups = _groups(series, worker)
    for against, _ in groups:
        for figure in ("speed-up", "efficiency"):
            table.add_column(f"{figure}\nto {against}", justify="right")
    for point in series.points:
        cells = [cell for _, baseline in groups for cell in _cells(baseline, point)]
        table.add_row(*_facts(point), *cells)
    return table


def _groups(series: Series, worker: str) -> list[tuple[str, Baseline]]:
    """The baselines with their names, once where both give the same figures for all sizes."""
    groups = []
    for baseline in series.baselines:
        units, unit = baseline.point.units(baseline.unit), worker if baseline.unit == "workers" else "node"
        groups.append((f"{units:,} {unit}{'s' if units > 1 else ''}", baseline))
    if len(groups) == 2 and all(_cells(groups[0][1], point) == _cells(groups[1][1], point) for point in series.points):
        return [(" =\n".join(against for against, _ in groups), groups[0][1])]
    return groups


def _facts(point: Point) -> list[str]:
    batch_per_worker, accumulation = point.runs[0].batch
    batch = f"{batch_per_worker:,}" + (f" x {accumulation:,}" if accumulation > 1 else "")
    spread = f"{point.p5:,.1f} to {point.p95:,.1f}" if len(point.runs) > 1 else "one run"
    return [
        f"{point.size.nodes:,}",
        f"{point.size.workers:,}",
        batch,
        f"{point.runs[0].batch_global:,}",
        f"{len(point.runs):,}",
        f"{point.rate:,.1f}",
        spread,
    ]


def _cells(baseline: Baseline, point: Point) -> list[str]:
    if not baseline.applies(point):
        return ["–", "–"]
    return [f"{baseline.speed_up(point):.2f}", f"{baseline.efficiency(point):.1%}"]
