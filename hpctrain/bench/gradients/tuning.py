"""`hpctrain bench gradients --tune`: which bucket sizes make our exchange fastest here, written down for a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpctrain.bench.blocks import Sample, Spread, ratios
from hpctrain.bench.gradients.measure import Bench, Contest
from hpctrain.config.dialect import dump_yaml
from hpctrain.metrics.jsonfiles import write_atomic

#: sizes tried beside the configured one
BUCKETS_MIB = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

Candidate = dict[str, float]


def candidates(configured: Candidate, bytes_fp32: int) -> list[Candidate]:
    """The configured sizes first, then others; of those that hold all gradients in one bucket only the smallest."""
    whole = next((size for size in BUCKETS_MIB if size * 2**20 >= bytes_fp32), BUCKETS_MIB[-1])
    sizes = (configured | {"bucket_mib": size} for size in BUCKETS_MIB if size <= whole)
    return [configured, *(found for found in sizes if found != configured)]


def best_of(samples: Sequence[Sequence[Sample]]) -> tuple[int, list[Spread]]:
    """Which candidate is fastest, and each one's time over that of the first, taken within rounds."""
    spreads = [Spread.of(ratios(found, samples[0])) for found in samples]
    return min(range(len(samples)), key=lambda number: spreads[number].median), spreads


def tune(bench: Bench, bytes_fp32: int, rounds: int, on_round: Callable[[int], None]) -> dict[str, Any]:
    """Verify and time our exchange in its narrow format with each candidate, in turn in every round.

    A candidate is set up anew for each of its blocks, so that no more than one holds memory.
    """
    settings = bench.settings_of(Contest(bench.ours, "fp16"))
    tried = candidates({"bucket_mib": settings["bucket_mib"]}, bytes_fp32)
    samples: list[list[Sample]] = [[] for _ in tried]
    generator = random.Random(bench.config.seed)
    for number in range(rounds):
        for index in generator.sample(range(len(tried)), len(tried)):
            bench.enter(bench.ours, "tune", settings | tried[index])
            samples[index].append(bench.block(bench.ours, "tune"))
            bench.ask(bench.ours, {"do": "withdraw", "name": "tune"})
        on_round(number + 1)
    best, spreads = best_of(samples)
    return {
        "compression": settings["compression"],
        "reduction": settings["reduction"],
        "best": tried[best],
        "candidates": [
            candidate
            | {
                "step_s": asdict(Spread.of([sample.step_s for sample in found])),
                "to_configured": asdict(spread),
                "samples": {"step_s": [sample.step_s for sample in found]},
            }
            for candidate, found, spread in zip(tried, samples, spreads, strict=True)
        ],
    }


def write_fragment(path: Path, tuning: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """A configuration that another may extend, with the best sizes only."""
    heading = (
        f"# Bucket sizes that exchanged the gradients of {settings['model']['name']} fastest in "
        f"{tuning['compression']} (reduction {tuning['reduction']}),\n"
        f"# {settings['ranks']} ranks on one host, {settings['device']}. Made by `hpctrain bench gradients --tune`.\n"
    )
    write_atomic(path, (heading + dump_yaml({"gradients": tuning["best"]})).encode())


def tuning_sentence(tuning: Mapping[str, Any], path: Path) -> str:
    """The outcome in words."""
    found = next(row for row in tuning["candidates"] if tuning["best"].items() <= row.items())
    sizes = ", ".join(f"gradients.{key}={value:g}" for key, value in tuning["best"].items())
    relative = found["to_configured"]
    return (
        f"fastest with {sizes}: {found['step_s']['median'] * 1e3:.1f} ms, {relative['median']:.3f} "
        f"({relative['p5']:.3f} to {relative['p95']:.3f}) of the time as configured; `extends: {path}` takes it"
    )
