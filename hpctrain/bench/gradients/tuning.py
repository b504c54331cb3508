"""`hpctrain bench gradients --tune`: which bucket sizes make our exchange fastest here, written down for a run."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hpctrain.bench.blocks import Sample, ratios
from hpctrain.bench.gradients.measure import Bench, Contest
from hpctrain.config.dialect import dump_yaml
from hpctrain.metrics.jsonfiles import write_atomic
from hpctrain.metrics.spread import Spread

#: sizes tried beside the configured ones
SIZES_MIB = {"bucket_mib": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0), "last_bucket_mib": (0.25, 0.5, 1.0, 2.0, 4.0)}

Candidate = dict[str, float]

_LABEL = "tune"


def candidates(key: str, best: Candidate, configured: Candidate, bytes_fp32: int) -> list[Candidate]:
    """The configured sizes first, then ``best`` with other values of ``key``.

    Of values that hold all gradients in one bucket the smallest is enough; no last bucket is larger than the others.
    """
    sizes = SIZES_MIB[key]
    most = next((size for size in sizes if size * 2**20 >= bytes_fp32), sizes[-1])
    if key == "last_bucket_mib":
        most = min(most, best["bucket_mib"])
    found = [configured, best, *(best | {key: size} for size in sizes if size <= most)]
    return [candidate for number, candidate in enumerate(found) if candidate not in found[:number]]


def best_of(samples: Sequence[Sequence[Sample]]) -> tuple[int, list[Spread]]:
    """Which candidate is fastest, and each one's time over that of the first, taken within rounds."""
    spreads = [Spread.of(ratios(found, samples[0])) for found in samples]
    return min(range(len(samples)), key=lambda number: spreads[number].median), spreads


def tune(bench: Bench, bytes_fp32: int, rounds: int, on_round: Callable[[int], None]) -> dict[str, Any]:
    """Find the fastest size of buckets for our exchange in its narrow format, then that of the last bucket."""
    settings = bench.settings_of(Contest(bench.ours, "fp16"))
    configured = {key: float(settings[key]) for key in SIZES_MIB}
    best, rows = configured, []
    for number, key in enumerate(SIZES_MIB):
        tried = candidates(key, best, configured, bytes_fp32)
        samples = _run(bench, [settings | candidate for candidate in tried], rounds, number * rounds, on_round)
        index, spreads = best_of(samples)
        best = tried[index]
        rows += [
            {
                **candidate,
                "searched": key,
                "step_s": asdict(Spread.of([sample.step_s for sample in found])),
                "to_configured": asdict(spread),
                "samples": {"step_s": [sample.step_s for sample in found]},
            }
            for candidate, found, spread in zip(tried, samples, spreads, strict=True)
        ]
    return {
        "compression": settings["compression"],
        "reduction": settings["reduction"],
        "best": best,
        "candidates": rows,
    }


def _run(
    bench: Bench, tried: Sequence[Mapping[str, Any]], rounds: int, done: int, on_round: Callable[[int], None]
) -> list[list[Sample]]:
    """A sample a round of each candidate, verified before it is timed.

    It is set up anew for each of its blocks, so that no more than one holds memory.
    """
    samples: list[list[Sample]] = [[] for _ in tried]
    generator = random.Random(bench.config.seed)
    for number in range(rounds):
        for index in generator.sample(range(len(tried)), len(tried)):
            bench.enter(bench.ours, _LABEL, tried[index])
            samples[index].append(bench.block(bench.ours, _LABEL))
            bench.ask(bench.ours, {"do": "withdraw", "name": _LABEL})
        on_round(done + number + 1)
    return samples


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
    # The last one found it, beside the others of its search.
    found = [row for row in tuning["candidates"] if tuning["best"].items() <= row.items()][-1]
    sizes = ", ".join(f"gradients.{key}={value:g}" for key, value in tuning["best"].items())
    relative = found["to_configured"]
    return (
        f"fastest with {sizes}: {found['step_s']['median'] * 1e3:.1f} ms, {relative['median']:.3f} "
        f"({relative['p5']:.3f} to {relative['p95']:.3f}) of the time as configured; `extends: {path}` takes it"
    )
