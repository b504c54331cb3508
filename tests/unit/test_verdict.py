"""One verdict for all ranks: magnitudes, norm, and whether anything is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from hpctrain.gradients.verdict import Jury, Verdict
from hpctrain.kernels.host import HostKernels
from tests.unit.fake_group import FakeCommunicator, run_group

KERNELS = HostKernels()


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("position", [0, 17, 1022])
def test_one_bad_element_anywhere_shows(bad: float, position: int) -> None:
    tensors = [torch.full((1023,), 3e38), torch.full((1023,), -3e38), torch.empty(0)]
    assert KERNELS.measure(tensors, norm=False)[0] == torch.tensor(3e38).double()
    tensors[1][position] = bad
    assert KERNELS.measure(tensors, norm=True)[0] == torch.inf


def test_the_squares_are_summed_wide() -> None:
    tensors = [torch.full((1000,), 1e20), torch.full((10,), -3.0)]
    assert KERNELS.measure(tensors, norm=True)[1].item() == pytest.approx(1e43)
    assert KERNELS.measure([], norm=True).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("hosts", [None, ["here", "here", "here"]], ids=["by the engine", "in shared memory"])
def test_ranks_that_find_different_figures_end_with_the_largest(hosts: list[str] | None) -> None:
    def work(comm: FakeCommunicator) -> list[Verdict]:
        jury = Jury(comm, share=hosts is not None)
        verdicts = []
        for step in range(3):
            spoilt = step == 1 and comm.rank == 2
            first = torch.tensor([2.0 + comm.rank, 9.0], dtype=torch.float64)
            second = torch.tensor([float("nan") if spoilt else 1.0, 16.0 - comm.rank], dtype=torch.float64)
            verdicts.append(jury.judge([first, second], norm=True))
        jury.close()
        return verdicts

    ranks = run_group(3, work, hosts)
    assert ranks[0] == ranks[1] == ranks[2]
    assert [verdict.finite for verdict in ranks[0]] == [True, False, True]
    assert ranks[0][0] == Verdict((4.0, 1.0), 5.0)
    assert ranks[0][1].magnitudes == (4.0, math.inf)


def test_of_nothing_the_verdict_is_zero() -> None:
    assert run_group(1, lambda comm: Jury(comm, share=False).judge([], norm=True)) == [Verdict((), 0.0)]


def test_the_norm_is_there_when_asked_for() -> None:
    figures = [torch.tensor([2.0, 9.0], dtype=torch.float64)]
    for norm, expected in ((True, 3.0), (False, None)):

        def work(comm: FakeCommunicator, norm: bool = norm) -> Verdict:
            return Jury(comm, share=False).judge(figures, norm=norm)

        assert run_group(2, work) == [Verdict((2.0,), expected)] * 2
