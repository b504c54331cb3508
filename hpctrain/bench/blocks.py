"""How variants of one thing are timed against each other: rounds of blocks in random order, and ratios by round.

The machine's pace drifts and others use it, so that numbers taken minutes apart do not compare. In a round every
variant runs one block; a ratio is taken within each round, and what is told is its median and its spread over the
rounds.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpctrain.comm.base import Communicator
from hpctrain.metrics.clock import synchronise

if TYPE_CHECKING:
    from hpctrain.bench.variants import Variant

#: steps at the start of a block that are not timed: caches, pools and the engine's negotiation fill anew
WARMUP_STEPS = 3


@dataclass(frozen=True, slots=True)
class Sample:
    """One block: seconds a step on the slowest rank, and seconds of CPU a step, over all ranks and their threads."""

    step_s: float
    cpu_s: float


def run_block(variant: Variant, comm: Communicator, steps: int, tick: Callable[[], None]) -> Sample:
    """Time ``steps`` steps of ``variant``, after some that warm up; ``tick`` is called before each. Collective."""
    with variant.turn():
        for _ in range(WARMUP_STEPS):
            tick()
            variant.step()
        settle(comm)
        started_s, started_cpu_s = time.perf_counter(), time.process_time()
        for _ in range(steps):
            tick()
            variant.step()
        synchronise(comm.device)
        cpu_s, elapsed_s = time.process_time() - started_cpu_s, time.perf_counter() - started_s
        settle(comm)
    rows = comm.all_gather_object([elapsed_s, cpu_s])
    return Sample(max(row[0] for row in rows) / steps, sum(row[1] for row in rows) / steps)


def settle(comm: Communicator) -> None:
    """Wait for the device and for all ranks."""
    synchronise(comm.device)
    comm.barrier()


def run_rounds(
    variants: Sequence[Variant],
    comm: Communicator,
    *,
    rounds: int,
    steps: int,
    seed: int,
    tick: Callable[[], None],
    on_round: Callable[[int], None],
) -> dict[str, list[Sample]]:
    """Samples of each variant, one a round. The order within rounds follows from ``seed``, equal on all ranks."""
    samples: dict[str, list[Sample]] = {variant.name: [] for variant in variants}
    generator = random.Random(seed)
    for number in range(rounds):
        for variant in generator.sample(variants, len(variants)):
            samples[variant.name].append(run_block(variant, comm, steps, tick))
        on_round(number + 1)
    return samples


def ratios(numerator: Sequence[Sample], denominator: Sequence[Sample]) -> list[float]:
    """Step time of one variant over that of another, round by round."""
    return [above.step_s / below.step_s for above, below in zip(numerator, denominator, strict=True)]
