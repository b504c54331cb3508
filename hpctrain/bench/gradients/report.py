"""What `bench gradients` leaves: the JSON record with every sample, a table, and a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from hpctrain.bench.gradients.groups import PEERS, group_named
from hpctrain.bench.gradients.measure import (
    FORMATS,
    TOLERANCE,
    Bench,
    Contest,
    Samples,
    describe_settings,
    ratios_to_ours,
)
from hpctrain.metrics.spread import Spread

SCHEMA = 1

#: section of the record by format
RATIOS = {"fp16": "ratios", "fp32": "ratios_fp32"}

#: how the sentence calls them
_SPOKEN = {
    "hpctrain_horovod": "hpctrain over Horovod",
    "hpctrain_mpi": "hpctrain over mpi4py",
    "hpctrain_torch": "hpctrain over torch.distributed",
    "horovod_mpi": "Horovod over MPI",
    "horovod_gloo": "Horovod over Gloo",
    "ddp": "DDP",
    "mpi4py_naive": "naive mpi4py",
    "chainermn_style": "ChainerMN's way",
}
_KEYS = {str(group.key): group.name for group in PEERS}


def record_of(bench: Bench, samples: Samples, rounds: int) -> dict[str, Any]:
    """The JSON record, less provenance."""
    compared = {
        RATIOS[form]: {
            key: {**asdict(Spread.of(values)), "rounds": values}
            for key, values in ratios_to_ours(samples, bench.ours, form, _KEYS).items()
        }
        for form in FORMATS
    }
    record = {
        "schema": SCHEMA,
        "what": "bench gradients",
        "settings": describe_settings(bench, rounds),
        "ours": bench.ours,
        **compared,
        "variants": {name: _describe(bench, samples, name) for name in bench.company.crews},
        "verified": {
            "tolerance": TOLERANCE,
            "apart": {
                form: {
                    contest.name: found["apart"] for contest, found in bench.verified.items() if contest.format == form
                }
                for form in FORMATS
            },
        },
        "unavailable": bench.unavailable,
    }
    return record | {"sentence": sentence(record)}


def _describe(bench: Bench, samples: Samples, name: str) -> dict[str, Any]:
    """What a competitor is, and its figures by format; seconds are of one exchange."""
    described: dict[str, Any] = {"what": group_named(name).what, "versions": bench.company.told[name]["versions"]}
    for form in FORMATS:
        if found := samples.get(Contest(name, form)):
            step_s, cpu_s = [sample.step_s for sample in found], [sample.cpu_s for sample in found]
            described[form] = {
                "how": bench.verified[Contest(name, form)]["how"],
                "step_s": asdict(Spread.of(step_s)),
                "cpu_s": asdict(Spread.of(cpu_s)),
                "samples": {"step_s": step_s, "cpu_s": cpu_s},
            }
    return described


def sentence(record: Mapping[str, Any]) -> str:
    """The outcome in words."""
    settings, ours = record["settings"], record["variants"][record["ours"]]
    clauses = []
    for form in (form for form in FORMATS if form in ours):
        took = f"in {ours[form]['step_s']['median'] * 1e3:.1f} ms in " + (
            settings["compression_of_ours"] if form == "fp16" else form
        )
        longer = [
            f"{_SPOKEN[_KEYS[key]]} {found['median']:.2f} ({found['p5']:.2f} to {found['p95']:.2f})"
            for key, found in record[RATIOS[form]].items()
        ]
        clauses.append(took + (f", where the others take times as long: {', '.join(longer)}" if longer else ""))
    words = (
        f"{_SPOKEN[record['ours']]} exchanges the {settings['tensors']} gradients of {settings['model']['name']} "
        f"({settings['elements'] / 1e6:.1f} M) on {settings['ranks']} ranks ({settings['device']}) "
    )
    absent = [f"{name} was not measured: {why}" for name, why in record["unavailable"].items()]
    return "; ".join([words + "; ".join(clauses), *absent]) + "."


def print_record(record: Mapping[str, Any]) -> None:
    """Print times and ratios, a table for each format, what each competitor is, and the sentence."""
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(highlight=False)
    for form in FORMATS:
        table = Table(Column("competitor", no_wrap=True), "ms", "5 to 95 %", "CPU ms", "time / ours", title=form)
        for name, figures in record["variants"].items():
            if form in figures:
                table.add_row(name, *_cells(figures[form], record[RATIOS[form]].get(group_named(name).key)))
        console.print(table)
    for name, figures in record["variants"].items():
        console.print(f"{name}: {figures['what']}", soft_wrap=True, markup=False)
    console.print(record["sentence"], soft_wrap=True, markup=False)


def _cells(figures: Mapping[str, Any], ratio: Mapping[str, Any] | None) -> list[str]:
    step_ms = {key: 1e3 * value for key, value in figures["step_s"].items()}
    return [
        f"{step_ms['median']:.2f}",
        f"{step_ms['p5']:.2f} to {step_ms['p95']:.2f}",
        f"{1e3 * figures['cpu_s']['median']:.1f}",
        f"{ratio['median']:.2f}" if ratio else "",
    ]
