"""What the benches leave: a JSON record with every sample, a table, and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from hpctrain.bench.blocks import Sample, ratios
from hpctrain.bench.variants import Variant
from hpctrain.metrics.spread import Spread

SCHEMA = 1

Samples = Mapping[str, Sequence[Sample]]


def describe_variants(variants: Sequence[Variant], samples: Samples, batch_global: int) -> dict[str, Any]:
    """For each variant what it is, its figures and the samples behind them; seconds are of one step."""
    described = {}
    for variant in variants:
        step_s = [sample.step_s for sample in samples[variant.name]]
        cpu_s = [sample.cpu_s for sample in samples[variant.name]]
        spread = Spread.of(step_s)
        described[variant.name] = {
            "what": variant.what,
            "step_s": asdict(spread),
            "images_per_s": batch_global / spread.median,
            "cpu_s": asdict(Spread.of(cpu_s)),
            "samples": {"step_s": step_s, "cpu_s": cpu_s},
        }
    return described


def compare(samples: Samples) -> dict[str, Any]:
    """Ratios to ``hpctrain``, by rounds: what it adds to a loop by hand, how much faster than Horovod's it is."""
    compared: dict[str, list[float]] = {}
    for name, key in (("bare", "overhead"), ("bare_local", "overhead_and_exchange")):
        if name in samples:
            compared[key] = [ratio - 1 for ratio in ratios(samples["hpctrain"], samples[name])]
    if "horovod" in samples:
        compared["speedup_over_horovod"] = ratios(samples["horovod"], samples["hpctrain"])
    return {key: {**asdict(Spread.of(values)), "rounds": values} for key, values in compared.items()}


def sentence(compared: Mapping[str, Any], unavailable: Mapping[str, str]) -> str:
    """The outcome in words."""
    overhead = compared["overhead"]
    comparative = "more" if overhead["median"] >= 0 else "less"
    words = (
        f"hpctrain's step takes {abs(overhead['median']):.1%} {comparative} time than the bare loop's "
        f"(rounds: {overhead['p5']:+.1%} to {overhead['p95']:+.1%})"
    )
    if "speedup_over_horovod" in compared:
        faster = compared["speedup_over_horovod"]
        words += (
            f" and does {faster['median']:.3f} times the images/s of Horovod's DistributedOptimizer "
            f"({faster['p5']:.3f} to {faster['p95']:.3f})"
        )
    for name, reason in unavailable.items():
        words += f"; {name} was not measured: {reason}"
    return words + "."


def step_cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """The columns of one variant of `bench step`."""
    step_s = figures["step_s"]
    return {
        "ms a step": f"{step_s['median'] * 1e3:.2f}",
        "5 to 95 %": f"{step_s['p5'] * 1e3:.2f} to {step_s['p95'] * 1e3:.2f}",
        "images/s": f"{figures['images_per_s']:,.1f}",
        "CPU ms": f"{figures['cpu_s']['median'] * 1e3:.2f}",
    }


def rate_cells(figures: Mapping[str, Any]) -> dict[str, str]:
    """The columns of one variant of `bench data`."""
    rate = figures["images_per_s"]
    return {"images/s": f"{rate['median']:,.1f}", "5 to 95 %": f"{rate['p5']:,.1f} to {rate['p95']:,.1f}"}


def print_outcome(record: Mapping[str, Any], cells_of: Callable[[Mapping[str, Any]], Mapping[str, str]]) -> None:
    """Print a table of the record's variants, what each of them is, and the sentence."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    rows = {name: cells_of(figures) for name, figures in record["variants"].items()}
    table = Table("variant", *next(iter(rows.values())))
    for name, cells in rows.items():
        table.add_row(name, *cells.values())
    console.print(table)
    for name, figures in record["variants"].items():
        console.print(f"{name}: {figures['what']}", soft_wrap=True, markup=False)
    console.print(record["sentence"], soft_wrap=True, markup=False)
