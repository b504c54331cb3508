"""Synthetic pictures: free, the same for the same request, and of the right form."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.index import RECORD, Index
from hpctrain.data.synthetic import BATCHES, SyntheticLoader
from hpctrain.data.types import Request


def make(seed: int = 1, **options: Any) -> SyntheticLoader:
    samples = np.zeros(100, RECORD)
    samples["label"] = np.arange(100) % 7
    config = DataConfig(image_size=8, **options)
    cpu = torch.device("cpu")
    return SyntheticLoader(config, Index(samples, (), ()), seed=seed, device=cpu, batch_size=5, threads=1)


def request(first: int) -> Request:
    return Request(np.arange(first, first + 5), 0, 5, "train")


def test_form_and_labels() -> None:
    (batch,) = make(channels=1).load([request(10)])
    assert batch.images.shape == (5, 1, 8, 8)
    assert batch.images.dtype == torch.float32
    assert batch.labels.tolist() == [3, 4, 5, 6, 0]
    assert batch.labels.dtype == torch.int64


def test_a_batch_follows_from_seed_and_request() -> None:
    first = [batch.images for batch in make().load([request(n) for n in range(BATCHES)])]
    again = [batch.images for batch in make().load([request(n) for n in reversed(range(BATCHES))])]
    for one, other in zip(first, reversed(again), strict=True):
        assert torch.equal(one, other)
    (other_seed,) = make(seed=2).load([request(0)])
    assert not torch.equal(first[0], other_seed.images)
    assert len({float(images.sum()) for images in first}) == BATCHES


def test_no_picture_is_made_twice() -> None:
    loader = make()
    (one,), (other,) = list(loader.load([request(0)])), list(loader.load([request(BATCHES)]))
    assert one.images.data_ptr() == other.images.data_ptr()
    loader.close()
