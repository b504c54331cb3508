"""Which runs make a scaling series: the batch a worker for each size, from one configuration.

`slurm/scaling.sh` asks for it and submits a job a line. Weak scaling leaves the batch a worker as the configuration
has it; strong scaling keeps the global batch that it gives on the smallest size, so that the smallest is in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hpctrain.config.schema import Config
from hpctrain.errors import UserError

Mode = Literal["strong", "weak", "both"]


@dataclass(frozen=True, slots=True, order=True)
class PlannedRun:
    """One run of a series: ``train.batch_per_worker`` on so many workers."""

    workers: int
    batch_per_worker: int


def plan_series(config: Config, mode: Mode, workers: Sequence[int]) -> list[PlannedRun]:
    """The runs of a strong or a weak series over these numbers of workers, or of both; each once, by size.

    Raises UserError for fewer than two sizes, or where the global batch does not divide among the workers.
    """
    sizes = sorted(set(workers))
    if len(sizes) < 2:
        raise UserError(f"a scaling series needs at least two sizes, not only {sizes[0]} workers: name another")
    batch = config.train.batch_per_worker
    runs = {PlannedRun(size, batch) for size in sizes} if mode != "strong" else set()
    if mode != "weak":
        runs |= {PlannedRun(size, _share(batch * sizes[0], size, sizes[0])) for size in sizes}
    return sorted(runs)


def _share(held: int, size: int, smallest: int) -> int:
    if held % size:
        raise UserError(
            f"strong scaling holds the global batch of the smallest size, {held} on {smallest} workers, which does not "
            f"divide among {size}: set train.batch_per_worker so that it does, leave {size} out, or ask for --weak"
        )
    return held // size
