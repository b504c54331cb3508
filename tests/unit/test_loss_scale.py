from __future__ import annotations

import pytest
import torch
from torch import nn

from hpctrain.errors import UserError
from hpctrain.gradients.loss_scale import LossScale
from hpctrain.gradients.reducer import GradientExchange
from tests.unit.fake_group import FakeCommunicator, run_group


def test_moves_as_torchs_scaler_does() -> None:
    ours, theirs = LossScale(), torch.amp.GradScaler("cpu")
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    theirs.scale(torch.ones(1))
    for step in range(4100):
        finite = step not in (5, 6, 2500)
        weight.grad = torch.full((1,), 1.0 if finite else float("inf"))
        theirs.step(optimizer)
        theirs.update()
        ours.update(finite)
        assert ours.value == theirs.get_scale()


def test_state_survives_a_round_trip() -> None:
    before = LossScale()
    for finite in (True, False, True, True):
        before.update(finite)
    after = LossScale()
    after.load_state_dict(before.state_dict())
    assert (after.value, after.good_steps) == (2.0**15, 2)


def test_gradients_that_overflow_at_every_scale_end_the_run() -> None:
    scale = LossScale()

    def overflow_for_ever() -> None:
        while True:
            scale.update(False)

    with pytest.raises(UserError, match=r"not finite in fp16 at any loss scale down to .* lower schedule\.lr"):
        overflow_for_ever()


def test_the_scale_stays_finite() -> None:
    scale = LossScale(2.0**127)
    scale.good_steps = 1999
    scale.update(True)
    assert scale.value == 2.0**127


@pytest.mark.parametrize("reduction", ["engine", "ordered"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_one_bad_rank_makes_all_skip_and_scale_alike(reduction: str, bad: float) -> None:
    def work(comm: FakeCommunicator) -> list[tuple[bool, float]]:
        model = nn.Linear(8, 3)
        exchange = GradientExchange(model, comm, reduction=reduction, bucket_bytes=64, judge=True)
        scale, seen = LossScale(), []
        for step in range(3):
            with exchange.accumulate(last=True, scale=1 / scale.value):
                factor = bad if step == 1 and comm.rank == 2 else 1.0
                scale.scale(model(torch.ones(2, 8)).sum() * factor).backward()
            verdict = exchange.finish().verdict
            assert verdict is not None
            finite = verdict.finite
            scale.update(finite)
            seen.append((finite, scale.value))
            if finite:
                torch.testing.assert_close(model.bias.grad, torch.full((3,), 2.0))
        return seen

    assert run_group(3, work) == [[(True, 2.0**16), (False, 2.0**15), (True, 2.0**15)]] * 3
