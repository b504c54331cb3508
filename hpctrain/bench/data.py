"""`hpctrain bench data`: pictures a second of each loader alone, fed the same windows, on one process.

Three ways to the same batches: our DALI loader, DALI alone with its own reader and its own random crop, and torch's
DataLoader with Pillow. Nothing is trained, and nothing crosses ranks. Before anything is timed, the first two
that see the same windows must show the same pictures.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Protocol

import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.dali import IN_WORK, build_bare_pipeline
from hpctrain.data.feed import Share, train_requests
from hpctrain.data.index import Index
from hpctrain.data.loaders import make_loader
from hpctrain.data.sampler import EpochOrder
from hpctrain.data.types import Loader, Request
from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.spread import Spread

SCHEMA = 1

#: Mean absolute difference of two loaders' pictures of the same windows, on the scale 0-255, beyond which
#: nothing is timed. Rounding of two resizers gives about 0.2.
MAX_DIFFERENCE = 1.0

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Task:
    """What each variant does in a block: ``batches`` of ``batch_size`` pictures with ``threads`` decoding."""

    config: DataConfig
    index: Index
    seed: int
    batch_size: int
    threads: int
    batches: int

    def requests(self, number: int) -> list[Request]:
        """The requests of block ``number``: epoch after epoch, as in training."""
        order = EpochOrder(len(self.index), self.seed, self.config.shuffle_block, self.config.shuffle_window)
        stream = train_requests(order, Share(0, 1, self.batch_size), pad=True, epochs=2**31)
        first = number * self.batches
        return list(islice(stream, first, first + self.batches))


class Variant(Protocol):
    """One way to get batches. Between two blocks nothing of it runs."""

    def run(self, requests: Sequence[Request]) -> None:
        """Have as many batches as there are requests, one after another."""

    def close(self) -> None:
        """Give everything back."""


class OfLoader:
    """A loader of ours."""

    def __init__(self, task: Task, name: str) -> None:
        config = task.config.model_copy(update={"loader": name, "decode": "cpu"})
        self.loader: Loader = make_loader(
            config, task.index, seed=task.seed, device=_CPU, batch_size=task.batch_size, threads=task.threads
        )

    def run(self, requests: Sequence[Request]) -> None:
        for _ in self.loader.load(requests):
            pass

    def close(self) -> None:
        self.loader.close()


class BareDali:
    """DALI by itself. It draws its own samples and windows, so of the requests only the number counts."""

    def __init__(self, task: Task) -> None:
        self._pipeline: Any = build_bare_pipeline(task.config, task.index, task.batch_size, task.threads)
        self._prefetched = False

    def run(self, requests: Sequence[Request]) -> None:
        # As many runs as batches, so that nothing is in work when the block ends; the first of all starts IN_WORK.
        scheduled = 0
        for taken in range(len(requests)):
            while scheduled < min(taken + IN_WORK, len(requests)):
                self._pipeline.schedule_run()
                scheduled += 1 if self._prefetched else IN_WORK
                self._prefetched = True
            self._pipeline.share_outputs()
            self._pipeline.release_outputs()

    def close(self) -> None:
        self._pipeline = None


VARIANTS: dict[str, Callable[[Task], Variant]] = {
    "dali": lambda task: OfLoader(task, "dali"),
    "bare_dali": BareDali,
    "torch": lambda task: OfLoader(task, "torch"),
}

WHAT = {
    "dali": "our loader: DALI fed with bytes, windows and flips",
    "bare_dali": "DALI alone: its reader, decoders.image_random_crop, coin_flip",
    "torch": "torch.utils.data.DataLoader and Pillow: draft mode, resize(box=…, reducing_gap=2)",
}


def measure(task: Task, rounds: int, on_round: Callable[[int], None], provenance: dict[str, Any]) -> dict[str, Any]:
    """Time all variants in ``rounds`` rounds, each variant once a round in random order; the JSON record.

    Raises UserError when the data set is smaller than a batch, windows are not random or DALI is missing,
    MachineError when loaders disagree about a picture.
    """
    if len(task.index) < task.batch_size:
        raise UserError(
            f"the data set has {len(task.index)} samples, fewer than a batch of {task.batch_size}: "
            "set train.batch_per_worker lower"
        )
    if task.config.crop != "random":
        raise UserError("bench data compares random windows, which DALI by itself has too: set data.crop=random")
    variants = {name: make(task) for name, make in VARIANTS.items()}
    torch_threads = torch.get_num_threads()
    # Torch's own threads spin for a while after each operation, on cores that belong to the decoders here.
    torch.set_num_threads(1)
    try:
        difference = verify(task, variants)
        samples = _time_rounds(task, variants, rounds, on_round)
    finally:
        torch.set_num_threads(torch_threads)
        for variant in variants.values():
            variant.close()
    return _record(task, samples, difference, provenance)


def verify(task: Task, variants: dict[str, Variant]) -> float:
    """Mean absolute difference, 0-255, of what "dali" and "torch" show for one request."""
    ours, theirs = variants["dali"], variants["torch"]
    assert isinstance(ours, OfLoader)
    assert isinstance(theirs, OfLoader)
    std = torch.tensor(task.config.std).mean()
    pairs = zip(*(variant.loader.load(task.requests(0)[:1]) for variant in (ours, theirs)), strict=True)
    difference = max(float((one.images - other.images).abs().mean() * std) for one, other in pairs)
    if difference > MAX_DIFFERENCE:
        raise MachineError(f"the pictures of DALI and Pillow differ by {difference:.2f} grey levels on average")
    return difference


def _time_rounds(
    task: Task, variants: dict[str, Variant], rounds: int, on_round: Callable[[int], None]
) -> dict[str, list[float]]:
    """Images/s, one figure a round for each variant, after a block that warms up."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    generator = random.Random(task.seed)
    for number in range(rounds + 1):
        requests = task.requests(number)
        for name in generator.sample(sorted(variants), len(variants)):
            started = time.perf_counter()
            variants[name].run(requests)
            elapsed_s = time.perf_counter() - started
            if number > 0:
                samples[name].append(len(requests) * task.batch_size / elapsed_s)
        on_round(number)
    return samples


def _record(
    task: Task, samples: dict[str, list[float]], difference: float, provenance: dict[str, Any]
) -> dict[str, Any]:
    def ratio(above: str, below: str) -> dict[str, Any]:
        values = [one / other for one, other in zip(samples[above], samples[below], strict=True)]
        return {**asdict(Spread.of(values)), "rounds": values}

    table = task.index.samples
    return {
        "schema": SCHEMA,
        "what": "images/s of loaders alone, one process, CPU decoding",
        "settings": {
            "batch_size": task.batch_size,
            "threads": task.threads,
            "batches_per_block": task.batches,
            "image_size": task.config.image_size,
            "crop_area": list(task.config.crop_area),
        },
        "data": {
            "path": task.config.path,
            "samples": len(table),
            "mean_bytes": float(table["length"].mean()),
            "mean_width": float(table["width"].mean()),
            "mean_height": float(table["height"].mean()),
        },
        "verified": {"mean_difference_of_255": difference},
        "variants": {
            name: {"what": WHAT[name], "images_per_s": asdict(Spread.of(values)), "samples": values}
            for name, values in samples.items()
        },
        "ratios": {"dali_over_torch": ratio("dali", "torch"), "dali_over_bare_dali": ratio("dali", "bare_dali")},
        "provenance": provenance,
    }


def sentence(record: dict[str, Any]) -> str:
    """The outcome in words."""
    over_torch, over_bare = record["ratios"]["dali_over_torch"], record["ratios"]["dali_over_bare_dali"]
    rate = record["variants"]["dali"]["images_per_s"]["median"]
    return (
        f"The DALI loader gives {rate:.0f} images/s, {over_torch['median']:.2f} times torch's DataLoader with Pillow "
        f"({over_torch['p5']:.2f} to {over_torch['p95']:.2f}) and {over_bare['median']:.2f} times DALI by itself "
        f"({over_bare['p5']:.2f} to {over_bare['p95']:.2f})."
    )
