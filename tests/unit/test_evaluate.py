"""Exact evaluation: the same top-1 and top-5 for any number of ranks, size of set and batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hpctrain.data.feed import eval_requests
from hpctrain.data.types import Batch
from hpctrain.train.evaluate import evaluate
from hpctrain.train.state import Evaluation
from tests.unit.fake_group import FakeCommunicator, run_group


def skip() -> None:
    return


class Answers(nn.Module):
    """Gives a sample's logits, by the number in its only pixel."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, images: Tensor) -> Tensor:
        assert not self.training
        return self.table[images.reshape(len(images)).long()]


def loaded(labels: Tensor, rank: int, world_size: int, batch: int, corrupt: Collection[int] = ()) -> Iterator[Batch]:
    """What a loader gives when sample 0 stands in for all ``corrupt`` ones."""
    for request in eval_requests(len(labels), rank, world_size, batch):
        shown = np.where(np.isin(request.sample_ids, list(corrupt)), 0, request.sample_ids)
        ids = torch.from_numpy(shown)
        yield Batch(ids.float().reshape(-1, 1, 1, 1), labels[ids], request, shown)


def judged(
    table: Tensor, labels: Tensor, world_size: int, batch: int, corrupt: Collection[int] = ()
) -> list[Evaluation]:
    def rank(comm: FakeCommunicator) -> Evaluation:
        stream = loaded(labels, comm.rank, world_size, batch, corrupt)
        return evaluate(Answers(table).train(), stream, comm, autocast=nullcontext, on_batch=skip)

    return run_group(world_size, rank)


def by_hand(table: Tensor, labels: Tensor) -> tuple[int, int]:
    """Samples whose label is the largest, and among the five largest; the figures of the table are all different."""
    better = (table > table.gather(1, labels[:, None])).sum(dim=1)
    return int((better < 1).sum()), int((better < 5).sum())


@settings(max_examples=40)
@given(
    samples=st.integers(1, 40),
    corrupt=st.sets(st.integers(1, 40)),
    classes=st.integers(2, 9),
    world_size=st.integers(1, 4),
    batch=st.integers(1, 7),
    seed=st.integers(0, 2**16),
)
def test_every_sample_that_can_be_shown_counts_once(
    samples: int, corrupt: set[int], classes: int, world_size: int, batch: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    table = torch.rand(samples * classes, generator=generator).argsort().view(samples, classes).float()
    labels = torch.randint(0, classes, (samples,), generator=generator)
    results = judged(table, labels, world_size, batch, corrupt)
    whole = [number for number in range(samples) if number not in corrupt]
    seen, first, five = len(whole), *by_hand(table[whole], labels[whole])
    assert len(set(results)) == 1
    assert (results[0].seen, results[0].top1, results[0].top5) == (seen, first / seen, five / seen)
    expected = nn.functional.cross_entropy(table[whole].double(), labels[whole]).item()
    assert results[0].loss == pytest.approx(expected)


def test_ranks_share_the_work_and_each_batch_is_a_sign_of_life() -> None:
    labels = torch.zeros(23, dtype=torch.int64)
    beats: list[list[int]] = [[], [], []]

    def rank(comm: FakeCommunicator) -> None:
        stream = loaded(labels, comm.rank, 3, 4)
        beat: Callable[[], None] = lambda: beats[comm.rank].append(1)  # noqa: E731
        evaluate(Answers(torch.rand(23, 2)), stream, comm, autocast=nullcontext, on_batch=beat)

    run_group(3, rank)
    assert [len(rank_beats) for rank_beats in beats] == [2, 2, 2]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(training: bool) -> None:
    labels = torch.zeros(3, dtype=torch.int64)

    def rank(comm: FakeCommunicator) -> bool:
        model = Answers(torch.rand(3, 2)).train(training)
        evaluate(model, loaded(labels, 0, 1, 2), comm, autocast=nullcontext, on_batch=skip)
        return model.training

    assert run_group(1, rank) == [training]


def test_a_loss_of_narrow_logits_is_summed_wide() -> None:
    labels = torch.zeros(3, dtype=torch.int64)
    table = torch.full((3, 2), 1000.0, dtype=torch.float16)

    def rank(comm: FakeCommunicator) -> Evaluation:
        return evaluate(Answers(table), loaded(labels, 0, 1, 3), comm, autocast=nullcontext, on_batch=skip)

    assert run_group(1, rank)[0].loss == pytest.approx(0.6931471805599453, abs=1e-12)
