"""The torch loader: its workers change nothing in what is shown, mind their own business and end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.index import Index
from hpctrain.data.pillow_loader import PillowLoader
from hpctrain.data.types import Batch, Request
from hpctrain.errors import MachineError, UserError
from tests.unit.pictures import picture_set


def loader_of(index: Index, threads: int = 1, **options: Any) -> PillowLoader:
    config = DataConfig(**{"image_size": 16, "max_corrupt_share": 0.2, **options})
    return PillowLoader(config, index, seed=1, device=torch.device("cpu"), batch_size=4, threads=threads)


def requests_of(index: Index, epochs: int = 2) -> list[Request]:
    starts = range(0, len(index), 4)
    return [Request(np.arange(s, s + 4), epoch, 4, "train") for epoch in range(epochs) for s in starts]


def kept(batches: Any) -> list[Batch]:
    return [replace(batch, images=batch.images.clone(), labels=batch.labels.clone()) for batch in batches]


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.request is other.request


def break_sample(index: Index, sample: int) -> None:
    path = Path(index.shards[sample])
    path.write_bytes(path.read_bytes()[:-200] + bytes(200))


def test_workers_give_what_one_thread_gives(tmp_path: Path) -> None:
    index = picture_set(tmp_path)
    break_sample(index, 9)
    requests = requests_of(index)
    alone, workers = loader_of(index), loader_of(index, threads=2)
    expected = kept(alone.load(requests))
    assert_same(kept(workers.load(requests)), expected)
    stream = iter(workers.load(requests))
    assert_same(kept(next(stream) for _ in range(2)), expected[:2])
    stream.close()  # type: ignore[attr-defined]  # left in the middle; the same workers go on
    assert_same(kept(workers.load(requests[3:])), expected[3:])
    assert len(alone.corrupt) == len(workers.corrupt) == 1
    assert alone.corrupt == workers.corrupt
    assert alone.corrupt[0].startswith(index.shards[9])
    workers.close()


def test_a_corrupt_sample_shows_its_successor_with_its_label(tmp_path: Path) -> None:
    index = picture_set(tmp_path)
    (expected,) = kept(loader_of(index).load([Request(np.array([8, 10, 10, 11]), 0, 4, "train")]))
    break_sample(index, 9)
    (shown,) = kept(loader_of(index).load([Request(np.array([8, 9, 10, 11]), 0, 4, "train")]))
    assert torch.equal(shown.images, expected.images)
    assert torch.equal(shown.labels, expected.labels)


@pytest.mark.parametrize("threads", [1, 2])
def test_errors_of_workers_are_told_in_one_sentence(tmp_path: Path, threads: int) -> None:
    index = picture_set(tmp_path)
    break_sample(index, 3)
    loader = loader_of(index, threads, max_corrupt_share=0.01)
    with pytest.raises(UserError, match=r"^1 of 24 samples \(4\.17%\) cannot be decoded, more than data.max_corrupt"):
        kept(loader.load(requests_of(index)))
    loader.close()
    Path(index.shards[3]).unlink()
    loader = loader_of(index, threads)
    with pytest.raises(MachineError, match="cannot be read: No such file"):
        kept(loader.load(requests_of(index)))
    loader.close()


def test_a_set_without_any_sound_picture_ends_the_run(tmp_path: Path) -> None:
    index = picture_set(tmp_path, 4)
    for sample in range(4):
        break_sample(index, sample)
    with pytest.raises(UserError, match=r"4 of 4 samples \(100\.00%\) cannot be decoded"):
        kept(loader_of(index, max_corrupt_share=1.0).load(requests_of(index)))


_TRAINER = """
import sys, time
from pathlib import Path
from tests.unit.pictures import picture_set
from tests.unit.test_pillow_loader import loader_of, requests_of

if __name__ == "__main__":
    index = picture_set(Path(sys.argv[1]))
    stream = loader_of(index, threads=2).load(requests_of(index, epochs=10**6))
    next(stream)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(50):
        next(stream)
    print("went on", flush=True)
    time.sleep(60)
"""


def test_workers_ignore_the_trainers_signals_and_die_with_it(tmp_path: Path) -> None:
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    with subprocess.Popen(
        [sys.executable, script, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as trainer:
        assert trainer.stdin is not None
        assert trainer.stdout is not None
        try:
            assert trainer.stdout.readline() == "ready\n"
            below = psutil.Process(trainer.pid).children(recursive=True)
            assert len(below) >= 3, "a server and two workers"
            for process in below:
                for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
                    process.send_signal(number)
            print(file=trainer.stdin, flush=True)
            assert trainer.stdout.readline() == "went on\n"
        finally:
            trainer.kill()
    deadline = time.monotonic() + 20
    while any(process.is_running() for process in below) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [process for process in below if process.is_running()]
