"""The moving average: its recurrence, its use in evaluation, its state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hpctrain.errors import UserError
from hpctrain.optim.ema import Ema


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_the_average_is_the_recurrence_by_hand() -> None:
    model = make_net()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    ema = Ema(model, decay=0.75)
    for step in range(4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(step))
        ema.update(model)
        expected = {name: 0.75 * value + 0.25 * step for name, value in expected.items()}
    for name, shadow in ema.state_dict().items():
        torch.testing.assert_close(shadow, expected[name])


def test_evaluation_sees_the_average_and_training_its_own_values_again() -> None:
    model = make_net()
    ema = Ema(model, decay=0.5)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    pointers = [p.data_ptr() for p in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model[1].running_mean.fill_(5.0)
    own = {name: p.detach().clone() for name, p in model.named_parameters()}
    with ema.applied(model):
        assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())
        assert float(model[1].running_mean[0]) == 5.0
    assert all(torch.equal(p, own[name]) for name, p in model.named_parameters())
    assert all(torch.equal(shadow, start[name]) for name, shadow in ema.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_an_error_in_evaluation_leaves_the_training_values() -> None:
    model = make_net()
    ema = Ema(model, decay=0.5)
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    with pytest.raises(ZeroDivisionError), ema.applied(model):
        model(torch.zeros(2, 3)).sum().item() / 0
    assert torch.equal(model[0].weight, torch.full((2, 3), 3.0))


def test_state_comes_back_and_another_models_is_refused() -> None:
    model = make_net()
    ema, other = Ema(model, decay=0.5), Ema(make_net(), decay=0.5)
    saved = {name: tensor + 1.0 for name, tensor in ema.state_dict().items()}
    other.load_state_dict(saved)
    assert all(torch.equal(other.state_dict()[name], saved[name]) for name in saved)
    for wrong in (
        {name: tensor for name, tensor in saved.items() if name != "1.bias"},
        {**saved, "1.bias": torch.zeros(7)},
    ):
        with pytest.raises(UserError, match=r"does not fit this model, 1\.bias to begin with"):
            other.load_state_dict(wrong)
    with pytest.raises(UserError, match=r"extra\.weight to begin with: resume with the model"):
        other.load_state_dict({**saved, "extra.weight": torch.zeros(7)})
