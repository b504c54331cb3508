from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpctrain.gradients.ordered import OrderedReduction, tree_sum_
from hpctrain.gradients.reduction import complete, reduce_
from tests.unit.fake_group import FakeCommunicator, run_group

LENGTH = 48


def workers(count: int) -> Tensor:
    """Values of very different size, so that every order of summation rounds differently."""
    generator = torch.Generator().manual_seed(3)
    exponents = torch.randint(-12, 12, (count, LENGTH), generator=generator)
    return torch.randn(count, LENGTH, generator=generator) * torch.exp2(exponents)


def split_over(ranks: int, count: int) -> list[Tensor]:
    """The ordered sum of ``count`` workers on ``ranks`` ranks, each adding up its own workers first."""

    def work(comm: FakeCommunicator) -> Tensor:
        mine = workers(count).view(ranks, count // ranks, LENGTH)[comm.rank]
        buffer = tree_sum_(mine.clone()).clone()
        reduce_(OrderedReduction(comm, buffer))
        return buffer

    return run_group(ranks, work)


@pytest.mark.parametrize("count", [8, 16])
def test_every_split_of_the_workers_over_ranks_gives_the_same_bits(count: int) -> None:
    results = [total for ranks in (1, 2, 4, 8) for total in split_over(ranks, count)]
    assert all(torch.equal(total, results[0]) for total in results)
    assert not torch.equal(results[0], workers(count).sum(0)), "the values must tell orders of summation apart"


@given(count=st.integers(1, 33))
@settings(deadline=None)
def test_the_tree_adds_neighbours_first(count: int) -> None:
    level = list(workers(count))
    expected = level
    while len(expected) > 1:
        pairs = [expected[i : i + 2] for i in range(0, len(expected), 2)]
        expected = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    assert torch.equal(tree_sum_(workers(count)), expected[0])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_buffer_is_reduced_again_and_again_in_the_same_memory(ranks: int) -> None:
    def work(comm: FakeCommunicator) -> None:
        buffer = torch.empty(LENGTH)
        reduction = OrderedReduction(comm, buffer)
        for step in range(3):
            buffer.copy_(workers(ranks)[comm.rank] * (step + 1))
            reduce_(reduction)
            expected = workers(ranks).double().sum(0) * (step + 1)
            torch.testing.assert_close(buffer.double(), expected, rtol=1e-5, atol=1e-3)

    run_group(ranks, work)


def test_overlapping_reductions_share_one_sequence_of_collectives() -> None:
    def work(comm: FakeCommunicator) -> list[tuple[str, int]]:
        reductions = [OrderedReduction(comm, torch.full((length,), 1.0 + comm.rank)) for length in (4, 8, 12)]
        for reduction in reductions:
            reduction.start()
        complete(reductions)
        for reduction in reductions:
            reduction.wait()
            assert bool((reduction.buffer == 3).all())
        return comm.group.log[comm.rank]

    for log in run_group(2, work):
        assert [kind for kind, _ in log] == (["all_to_all"] * 3 + ["all_gather"] * 3) * 2
