"""The gradient kernels on one GPU against the ways without them: ResNet-50's 161 gradients, 25.6 M numbers.

    python -m benchmarks.gpu_gradients --device cuda --json gradients.json

The bar: scale and narrow within 45 microseconds on an H200, 3.4 TB/s. Results are compared with torch's own before
anything is timed. Exits 1 when they differ, or on an H200 above the bar. It has not run on a GPU yet; with
--device cpu the same program times the host's kernels, whose figures are for trying it out.

``device_us`` is the device's own time of a call: the calls queue up behind a kernel that keeps it busy, so the host's
time to launch them does not show. ``wall_us`` is a call with the host's time, ended by a synchronisation.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.ranks import conclude, parser
from hpctrain.arena import ALIGNMENT_BYTES
from hpctrain.config.schema import ResNetConfig
from hpctrain.kernels.base import Kernels, Piece
from hpctrain.kernels.registry import kernels_for
from hpctrain.metrics.clock import synchronise
from hpctrain.metrics.provenance import Provenance
from hpctrain.metrics.spread import Spread
from hpctrain.models.registry import build_model

BAR_US = 45.0
SCALE = 1024.0
#: Some 15 ms on today's GPUs, more than the host needs to queue the calls of one sample.
SPIN_CYCLES = 25_000_000
#: Calls of a sample; of those with a launch for each tensor fewer fit into the device's queue.
CALLS, CALLS_PER_TENSOR = 20, 4


@dataclass(frozen=True, slots=True)
class Way:
    """Something timed: ``call(turn)`` works on one of two sets of gradients, so that none is left in a cache."""

    name: str
    call: Callable[[int], Any]
    bytes_moved: int
    calls: int = CALLS


class Gradients:
    """Two sets of separate gradients, a wire and a bucket to bring them to."""

    def __init__(self, device: torch.device) -> None:
        with torch.device("meta"):
            model = build_model(ResNetConfig(name="resnet50"), num_classes=1000, in_channels=3, image_size=224)
        sizes = [parameter.numel() for parameter in reversed(list(model.parameters()))]
        step, self.starts, self.length = ALIGNMENT_BYTES // 4, [], 0
        for size in sizes:
            self.starts.append(self.length)
            self.length += -(-size // step) * step
        self.elements = sum(sizes)
        generator = torch.Generator(device).manual_seed(1)
        self.sets = [[1e-3 * torch.randn(size, generator=generator, device=device) for size in sizes] for _ in range(2)]
        self.wire = torch.zeros(self.length, dtype=torch.float16, device=device)
        self.bucket = torch.zeros(self.length, device=device)
        self.pieces = [
            [Piece(values, start) for values, start in zip(values_of, self.starts, strict=True)]
            for values_of in self.sets
        ]
        self.places = [self.wire[start : start + size] for start, size in zip(self.starts, sizes, strict=True)]


def ways(kernels: Kernels, gradients: Gradients) -> list[Way]:
    """Ours, then those of others: a cast for each tensor, torch's multi-tensor copy, and casting a full bucket."""
    wire, bucket, count, pieces, sets = (
        gradients.wire,
        gradients.bucket,
        gradients.elements,
        gradients.pieces,
        gradients.sets,
    )
    residual, peer = torch.zeros_like(bucket), wire.clone()
    return [
        Way("narrow", lambda turn: kernels.narrow(pieces[turn], wire, SCALE), 6 * count),
        Way(
            "narrow_with_feedback",
            lambda turn: kernels.narrow_with_feedback(pieces[turn], residual, wire, SCALE),
            14 * count,
        ),
        Way("count", lambda turn: kernels.count(pieces[turn], wire, SCALE), 6 * count),
        Way("widen", lambda turn: kernels.widen([wire], bucket, 1 / SCALE), 6 * gradients.length),
        Way("sum_two_rows", lambda turn: kernels.sum_rows([peer, wire], peer), 6 * gradients.length),
        Way("casts", lambda turn: [values.half() for values in sets[turn]], 6 * count, CALLS_PER_TENSOR),
        Way("foreach_copy", lambda turn: torch._foreach_copy_(gradients.places, sets[turn]), 6 * count),
        Way("bucket_cast", lambda turn: wire.copy_(bucket), 6 * gradients.length),
        Way("device_copy", lambda turn: residual.copy_(bucket), 8 * gradients.length),
    ]


def check(kernels: Kernels, gradients: Gradients) -> list[str]:
    """What differs from torch's own arithmetic; nothing, if all is well."""
    wrong = []
    kernels.narrow(gradients.pieces[0], gradients.wire, SCALE)
    expected = torch.zeros_like(gradients.wire)
    for values, start in zip(gradients.sets[0], gradients.starts, strict=True):
        expected[start : start + values.numel()] = (values * SCALE).half()
    if not torch.equal(gradients.wire, expected):
        wrong.append("narrow")
    found = kernels.widen([gradients.wire], gradients.bucket, 1 / SCALE)
    wide = expected.float() / SCALE
    if not torch.equal(gradients.bucket, wide) or found[0] != wide.abs().max():
        wrong.append("widen")
    if not torch.isclose(found[1], wide.double().square().sum(), rtol=1e-5):
        wrong.append("widen's sum of squares")
    total = torch.empty_like(expected)
    kernels.sum_rows([expected, gradients.wire], total)
    if not torch.equal(total, (expected.float() + gradients.wire.float()).half()):
        wrong.append("sum_rows")
    return wrong


def device_us(way: Way, device: torch.device) -> float:
    """Microseconds of the device a call; on a CPU the same as ``wall_us``."""
    if device.type == "cpu":
        return wall_us(way, device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    for turn in range(way.calls):
        way.call(turn % 2)
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) * 1e3 / way.calls


def wall_us(way: Way, device: torch.device) -> float:
    """Microseconds from the call until the device has done it."""
    samples = []
    for turn in range(3):
        synchronise(device)
        started = time.perf_counter()
        way.call(turn % 2)
        synchronise(device)
        samples.append((time.perf_counter() - started) * 1e6)
    return statistics.median(samples)


def measure(chosen: list[Way], device: torch.device, rounds: int, deadline: float) -> dict[str, dict[str, Any]]:
    """Samples of each way, in rounds of all of them in random order, after one round that warms up."""
    samples: dict[str, dict[str, list[float]]] = {way.name: {"device_us": [], "wall_us": []} for way in chosen}
    generator = random.Random(1)
    for number in range(rounds + 1):
        for way in generator.sample(chosen, len(chosen)):
            taken = {"device_us": device_us(way, device), "wall_us": wall_us(way, device)}
            for key, value in taken.items() if number else ():
                samples[way.name][key].append(value)
        if number and time.monotonic() > deadline:
            break
    rows = {}
    for way in chosen:
        spread = {key: asdict(Spread.of(values)) for key, values in samples[way.name].items()}
        rate = way.bytes_moved / spread["device_us"]["median"] * 1e-6
        rows[way.name] = {**spread, "bytes": way.bytes_moved, "tb_per_s": rate, "samples": samples[way.name]}
    return rows


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A peer's time over ours, round by round, for each peer and each clock."""
    found: dict[str, dict[str, Any]] = {}
    for peer in ("casts", "foreach_copy", "bucket_cast"):
        found[peer] = {}
        for clock in ("device_us", "wall_us"):
            pairs = zip(rows[peer]["samples"][clock], rows["narrow"]["samples"][clock], strict=True)
            found[peer][clock] = asdict(Spread.of([theirs / ours for theirs, ours in pairs]))
    return found


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=20)
    asked = options.parse_args()
    deadline, provenance = time.monotonic() + 0.8 * asked.limit_s, Provenance([])
    device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device(asked.device)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    kernels, gradients = kernels_for(device), Gradients(device)
    wrong = check(kernels, gradients)
    rows = {} if wrong else measure(ways(kernels, gradients), device, asked.rounds, deadline)
    narrow_us = rows["narrow"]["device_us"]["median"] if rows else None
    judged = gpu is not None and "H200" in gpu
    passed = not wrong and (not judged or narrow_us <= BAR_US)
    record = {
        "passed": passed,
        "sentence": f"wrong: {', '.join(wrong)}"
        if wrong
        else f"{gradients.elements} gradients narrowed in {narrow_us:.1f} us, {rows['narrow']['tb_per_s']:.2f} TB/s",
        "device": asked.device,
        "gpu": gpu,
        "gradients": {"tensors": len(gradients.starts), "elements": gradients.elements, "wire": "float16"},
        "bar": {"narrow_us": BAR_US, "gpu": "H200", "judged": judged},
        "wrong": wrong,
        "ways": rows,
        "ratios": ratios(rows) if rows else {},
        "provenance": provenance.to_record(),
    }
    return conclude(record, asked.json)


if __name__ == "__main__":
    sys.exit(main())
