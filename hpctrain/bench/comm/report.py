"""What `hpctrain bench comm` leaves: the figures of each operation by size, the fits, tables, and a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from hpctrain.bench.comm.fit import fit
from hpctrain.bench.comm.measure import Cell, Samples
from hpctrain.bench.comm.operations import OPERATIONS, Case
from hpctrain.bench.comm.sizes import tell
from hpctrain.metrics.spread import Spread

_GB = 1e9
#: share of CPU time given to other machines above which figures are not to be trusted
MAX_STEAL = 0.01
#: Wide enough for five algorithms; launchers often give their ranks a terminal of 80 columns that is none.
_MIN_WIDTH = 160

Figures = Mapping[Cell, Samples]


def describe_cases(samples: Figures, world_size: int) -> list[dict[str, Any]]:
    """For each case its factors and, by size, times (seconds of one run) and bandwidths (10^9 bytes per second)."""
    described = []
    for case, cells in _by_case(samples):
        factor = OPERATIONS[case.operation].bus_factor(world_size)
        described.append(
            {
                **asdict(case),
                "bus_factor": factor,
                "steps": OPERATIONS[case.operation].steps(world_size),
                "sizes": [_describe_size(cell, samples[cell], factor) for cell in cells],
            }
        )
    return described


def _describe_size(cell: Cell, sampled: Samples, bus_factor: float) -> dict[str, Any]:
    spread = Spread.of(sampled.time_s)
    algbw_gb_per_s = cell.size_bytes / spread.median / _GB
    return {
        "asked_bytes": cell.asked_bytes,
        "size_bytes": cell.size_bytes,
        "time_s": asdict(spread),
        "algbw_gb_per_s": algbw_gb_per_s,
        "busbw_gb_per_s": algbw_gb_per_s * bus_factor,
        "runs_per_block": sampled.runs,
        "samples": {"time_s": sampled.time_s},
    }


def describe_fits(samples: Figures, *, world_size: int, hosts: int, engine: str) -> list[dict[str, Any]]:
    """The section ``fit``: for each case with two sizes or more an entry that can be read by itself.

    T(size_bytes) = alpha_s * steps + size_bytes * bus_factor * beta_s_per_byte, in seconds.
    """
    described = []
    for case, cells in _by_case(samples):
        operation = OPERATIONS[case.operation]
        steps, factor = operation.steps(world_size), operation.bus_factor(world_size)
        sizes = [cell.size_bytes for cell in cells]
        found = fit(sizes, [samples[cell].time_s for cell in cells], steps, factor)
        if found is None:
            continue
        described.append(
            {
                **asdict(case),
                "engine": engine,
                "world_size": world_size,
                "hosts": hosts,
                "alpha_s": found.line.alpha_s,
                "beta_s_per_byte": found.line.beta_s_per_byte,
                "bandwidth_gb_per_s": found.bandwidth_gb_per_s,
                "steps": steps,
                "bus_factor": factor,
                "residual": found.line.residual,
                "worst_residual": found.line.worst,
                "sizes_bytes": [min(sizes), max(sizes)],
                "alpha_s_rounds": asdict(found.alpha_s),
                "beta_s_per_byte_rounds": asdict(found.beta_s_per_byte),
            }
        )
    return described


def _by_case(samples: Figures) -> Iterator[tuple[Case, list[Cell]]]:
    for case, cells in groupby(samples, key=lambda cell: cell.case):
        yield case, list(cells)


def sentence(record: Mapping[str, Any]) -> str:
    """The outcome in words: the fastest all-reduce of the first dtype, small and large, and what was left out."""
    ranks = f"{record['world_size']} ranks on {record['hosts']} host{'s' if record['hosts'] > 1 else ''}"
    words = f"Over {record['engine']['name']}, {ranks}: "
    rivals = [case for case in record["cases"] if case["operation"] == "all_reduce"]
    rivals = [case for case in rivals if case["dtype"] == rivals[0]["dtype"]]
    sizes = [row["asked_bytes"] for case in rivals for row in case["sizes"]]
    smallest, largest = min(sizes), max(sizes)
    quick, quick_row = _fastest(rivals, smallest)
    wide, wide_row = _fastest(rivals, largest)
    words += (
        f"an all-reduce of {tell(smallest)} {quick['dtype']} takes {quick_row['time_s']['median'] * 1e6:,.1f} µs "
        f"({quick['algorithm']}), of {tell(largest)} {wide_row['time_s']['median'] * 1e3:,.2f} ms at "
        f"{wide_row['busbw_gb_per_s']:.3g} GB/s of bus bandwidth ({wide['algorithm']}); every result was exact"
    )
    for reason in dict.fromkeys(record["unavailable"].values()):
        names = [name for name, why in record["unavailable"].items() if why == reason]
        words += f"; not measured: {', '.join(names)} ({reason})"
    steal = record["provenance"]["steal_share"]
    if steal is not None and steal > MAX_STEAL:
        words += f"; {steal:.1%} of this machine's CPU time went to others meanwhile: measure again"
    return words + "."


def _fastest(cases: Sequence[Mapping[str, Any]], asked_bytes: int) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    rows = [(case, row) for case in cases for row in case["sizes"] if row["asked_bytes"] == asked_bytes]
    return min(rows, key=lambda pair: float(pair[1]["time_s"]["median"]))


def print_tables(record: Mapping[str, Any]) -> None:
    """Print a table for each operation and dtype, one of the fits, and the sentence."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.width = max(console.width, _MIN_WIDTH)
    engine = f"engine {record['engine']['name']} ({record['engine_choice']}) on {record['device']}"
    console.print(engine, soft_wrap=True, markup=False)
    for (operation, dtype), group in groupby(record["cases"], key=lambda case: (case["operation"], case["dtype"])):
        cases = list(group)
        table = Table(title=f"{operation} {dtype}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("size", justify="right")
        for case in cases:
            for heading in (f"{case['algorithm']}\nµs", "algbw\nGB/s", "busbw\nGB/s"):
                table.add_column(heading, justify="right")
        for row in _rows(cases):
            table.add_row(*row)
        console.print(table)
    _print_fits(console, record["fit"])
    console.print(record["sentence"], soft_wrap=True, markup=False)


def _rows(cases: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    tables = [{row["asked_bytes"]: row for row in case["sizes"]} for case in cases]
    for asked_bytes in sorted(set().union(*tables)):
        cells = [tell(asked_bytes)]
        for table in tables:
            if row := table.get(asked_bytes):
                figures = (row["algbw_gb_per_s"], row["busbw_gb_per_s"])
                cells += [f"{row['time_s']['median'] * 1e6:,.1f}", *(f"{figure:.3f}" for figure in figures)]
            else:
                cells += ["", "", ""]
        yield cells


def _print_fits(console: Any, fits: Sequence[Mapping[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not fits:
        return
    title = "fit: time = α · steps + size · bus factor / B"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for heading in ("operation", "dtype", "algorithm"):
        table.add_column(heading)
    for heading in ("steps", "α µs", "B GB/s", "residual"):
        table.add_column(heading, justify="right")
    for one in fits:
        bandwidth = one["bandwidth_gb_per_s"]
        told = "" if bandwidth is None else f"{bandwidth:.3g}"
        names = (one["operation"], one["dtype"], one["algorithm"])
        table.add_row(*names, str(one["steps"]), f"{one['alpha_s'] * 1e6:.3g}", told, f"{one['residual']:.0%}")
    console.print(table)
