from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpctrain.gradients.central import CentralReduction
from hpctrain.gradients.reduction import complete, reduce_
from tests.unit.fake_group import FakeCommunicator, run_group

LENGTH = 48
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def values(ranks: int, dtype: torch.dtype) -> Tensor:
    """Of very different size, so that orders of summation and of rounding show."""
    generator = torch.Generator().manual_seed(5)
    exponents = torch.randint(-8, 8, (ranks, LENGTH), generator=generator)
    return (torch.randn(ranks, LENGTH, generator=generator) * torch.exp2(exponents)).to(dtype)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_rounded_once(ranks: int, dtype: torch.dtype) -> None:
    def work(comm: FakeCommunicator) -> Tensor:
        buffer = torch.empty(LENGTH, dtype=dtype)
        reduction = CentralReduction(comm, buffer)
        for step in range(2):
            buffer.copy_(values(ranks, dtype)[comm.rank] * (step + 1))
            reduce_(reduction)
        return buffer

    level = list(values(ranks, dtype).to(torch.promote_types(dtype, torch.float32)) * 2)
    while len(level) > 1:
        level = [sum(level[i : i + 2]) for i in range(0, len(level), 2)]  # type: ignore[misc]
    for total in run_group(ranks, work):
        assert torch.equal(total, level[0].to(dtype))


def test_all_goes_to_rank_0_and_the_sum_comes_from_it() -> None:
    def work(comm: FakeCommunicator) -> list[tuple[str, int]]:
        reductions = [CentralReduction(comm, torch.full((length,), 1.0 + comm.rank)) for length in (4, 8)]
        for reduction in reductions:
            reduction.start()
        complete(reductions)
        for reduction in reductions:
            reduction.wait()
            assert bool((reduction.buffer == 6).all())
        return comm.group.log[comm.rank]

    for log in run_group(3, work):
        assert log == [("gather 0", 4), ("gather 0", 8), ("broadcast 0", 4), ("broadcast 0", 8)]
