"""What error feedback owes is owed still after a resume, on as many ranks or another number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpctrain.errors import UserError
from hpctrain.gradients.residuals import gather_residuals, restore_residuals
from tests.unit.fake_group import FakeCommunicator, run_group


def owed(rank: int, length: int) -> list[Tensor]:
    return [torch.full((length,), 1.0 + rank), torch.arange(length) * (1.0 + rank)]


def saved(world_size: int, length: int) -> dict[str, Tensor]:
    first, *others = run_group(world_size, lambda comm: gather_residuals(comm, owed(comm.rank, length)))
    assert others == [{}] * (world_size - 1), "one rank writes for all"
    return first


def restored(world_size: int, length: int, checkpoint: dict[str, Tensor]) -> list[list[Tensor]]:
    def work(comm: FakeCommunicator) -> list[Tensor]:
        residuals = [torch.full((length,), 7.0) for _ in range(2)]
        restore_residuals(comm, residuals, checkpoint)
        return residuals

    return run_group(world_size, work)


@pytest.mark.parametrize("world_size", [1, 3])
def test_each_rank_gets_its_own_again(world_size: int) -> None:
    for rank, residuals in enumerate(restored(world_size, 6, saved(world_size, 6))):
        assert all(torch.equal(one, other) for one, other in zip(residuals, owed(rank, 6), strict=True))


@pytest.mark.parametrize("length", [6, 8])
def test_another_number_of_ranks_owes_as_much_in_the_mean(length: int) -> None:
    for residuals in restored(4, length, saved(2, 6)):
        expected = torch.stack([torch.stack(owed(rank, 6)) for rank in range(2)]).mean(0)
        assert torch.equal(torch.stack(residuals)[:, :6], expected)
        assert not torch.stack(residuals)[:, 6:].any()


def test_other_buckets_are_refused() -> None:
    with pytest.raises(UserError, match=r"owes 1 buckets and this run has 2; restore gradients\.bucket_mib and "):
        restored(2, 6, {"bucket-000": torch.zeros(2, 6)})
