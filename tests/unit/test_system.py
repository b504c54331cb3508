"""Use of the machine: counters of a step, and growth of memory over steps."""

from __future__ import annotations

from itertools import pairwise

import psutil
import pytest
import torch

from hpctrain.metrics.system import SystemUse

CPU = torch.device("cpu")


class FakeProcess:
    """A process whose resident memory the test sets."""

    def __init__(self) -> None:
        self.rss = 0

    def memory_info(self) -> FakeProcess:
        return self

    def cpu_percent(self, interval: float | None) -> float:
        return 150.0


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> FakeProcess:
    process = FakeProcess()
    monkeypatch.setattr(psutil, "Process", lambda: process)
    return process


def test_sample_tells_memory_and_cores(process: FakeProcess) -> None:
    process.rss = 1 << 30
    assert SystemUse(CPU).sample(1) == {"rss_bytes": 1 << 30, "cpu_cores": 1.5}


def test_sample_of_this_process_is_plausible() -> None:
    use = SystemUse(CPU)
    ballast = torch.ones(1 << 22)
    sample = use.sample(1)
    assert sample["rss_bytes"] > ballast.numel() * 4
    assert sample["cpu_cores"] >= 0


def test_gpu_adds_its_allocator(process: FakeProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "memory_allocated", {device: 100}.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", {device: 700}.__getitem__)
    sample = SystemUse(device).sample(1)
    assert (sample["gpu_allocated_bytes"], sample["gpu_peak_bytes"]) == (100, 700)


@pytest.mark.parametrize("samples", [8, 100, 513, 5000])
def test_slope_is_the_growth_after_the_start(process: FakeProcess, samples: int) -> None:
    use = SystemUse(CPU)
    for sample in range(samples):
        # The first third fills caches; afterwards 4,096 bytes a step leak, with a wobble around it.
        filling = min(sample, samples // 3) * 10_000_000
        process.rss = filling + 20 * sample * 4096 + (-1) ** sample
        use.sample(20 * sample)
    record = use.to_record()
    assert record["memory_slope_bytes_per_step"] == pytest.approx(4096, abs=1)
    assert record["rss_peak_bytes"] == process.rss
    kept = [step for step, _ in use._samples]
    assert len(kept) <= 512
    assert len({later - earlier for earlier, later in pairwise(kept)}) == 1, "the kept samples are evenly spaced"


def test_constant_memory_has_no_slope(process: FakeProcess) -> None:
    use = SystemUse(CPU)
    process.rss = 5
    for step in range(10):
        use.sample(step)
    assert use.memory_slope_bytes_per_step() == 0.0


def test_too_few_samples_tell_nothing(process: FakeProcess) -> None:
    use = SystemUse(CPU)
    for step in (1, 1, 1):
        use.sample(step)
    assert use.memory_slope_bytes_per_step() is None
    use.sample(1)
    assert use.memory_slope_bytes_per_step() is None, "four samples of one step have no slope"
