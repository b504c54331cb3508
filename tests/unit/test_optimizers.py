"""Optimizers: the rule by hand, state by name, and exact continuation from it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpctrain.config.schema import OptimizerConfig
from hpctrain.errors import UserError
from hpctrain.optim.build import build_optimizer
from hpctrain.optim.state import load_optimizer_state, optimizer_state

RULES: list[dict[str, Any]] = [
    {"name": "sgd"},
    {"name": "sgd", "nesterov": True},
    {"name": "sgd", "momentum": 0.0},
    {"name": "adam"},
    {"name": "rmsprop"},
    {"name": "rmsprop", "momentum": 0.0},
]
rules = pytest.mark.parametrize("rule", RULES, ids=lambda rule: "-".join(map(str, rule.values())))


def make_net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        images = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(images).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        optimizer.step()


def build(model: nn.Module, rule: dict[str, Any]) -> torch.optim.Optimizer:
    return build_optimizer(OptimizerConfig.model_validate({"weight_decay": 0.01, **rule}), model)


def values(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_rule_by_hand(nesterov: bool) -> None:
    """v = m v + g; w -= lr (g + m v if Nesterov, else v), with the decay inside g and the rate outside v."""
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build(model, {"name": "sgd", "nesterov": nesterov})
    weight, velocity = 2.0, 0.0
    for rate, gradient in ((0.1, 3.0), (0.01, -1.0)):
        model.weight.grad, model.bias.grad = torch.full((1, 1), gradient), torch.zeros(1)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        decayed = gradient + 0.01 * weight
        velocity = 0.9 * velocity + decayed
        weight -= rate * (decayed + 0.9 * velocity if nesterov else velocity)
        assert float(model.weight.detach()) == pytest.approx(weight, rel=1e-6)


@rules
def test_training_goes_on_bitwise_from_a_saved_state(rule: dict[str, Any]) -> None:
    whole = make_net()
    train(whole, build(whole, rule), range(6))
    for cut in (0, 3):
        first = make_net()
        optimizer = build(first, rule)
        train(first, optimizer, range(cut))
        saved = copy.deepcopy((first.state_dict(), optimizer_state(optimizer, first)))
        second = make_net(seed=9)
        resumed = build(second, rule)
        second.load_state_dict(saved[0])
        load_optimizer_state(resumed, second, saved[1])
        train(second, resumed, range(cut, 6))
        assert torch.equal(values(second), values(whole))


@rules
def test_state_is_tensors_by_slot_and_parameter(rule: dict[str, Any]) -> None:
    model = make_net()
    model[3].bias.requires_grad_(False)
    optimizer = build(model, rule)
    before = optimizer_state(optimizer, model)
    train(model, optimizer, range(2))
    after = optimizer_state(optimizer, model)
    assert {key: tensor.shape for key, tensor in before.items()} == {key: tensor.shape for key, tensor in after.items()}
    held = {id(tensor) for slots in optimizer.state.values() for tensor in slots.values() if tensor is not None}
    assert {id(tensor) for tensor in after.values()} == held
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert {key.partition("/")[2] for key in after} == (trained if held else set())


def test_state_of_another_model_or_optimizer_is_refused_and_changes_nothing() -> None:
    model = make_net()
    optimizer = build(model, {"name": "sgd"})
    train(model, optimizer, range(1))
    held = optimizer_state(optimizer, model)
    before = {key: tensor.clone() for key, tensor in held.items()}
    narrow = {key: tensor[:1] if key.endswith("3.bias") else tensor for key, tensor in held.items()}
    for tensors, sentence in (
        ({}, "missing: momentum_buffer/0.weight and 5 more"),
        ({**held, "exp_avg/0.weight": torch.zeros(1)}, "unknown: exp_avg/0.weight)"),
        (narrow, "of another shape: momentum_buffer/3.bias)"),
    ):
        with pytest.raises(UserError) as caught:
            load_optimizer_state(optimizer, model, tensors)
        assert sentence in str(caught.value)
        assert "does not fit SGD on this model" in str(caught.value)
        assert "resume with the model and optimizer it was saved with" in str(caught.value)
    after = optimizer_state(optimizer, model)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_loading_keeps_the_memory_format_of_the_parameter() -> None:
    model = make_net().to(memory_format=torch.channels_last)
    optimizer = build(model, {"name": "sgd"})
    load_optimizer_state(
        optimizer, model, {k: torch.ones_like(v) for k, v in optimizer_state(optimizer, model).items()}
    )
    weight = model[0].weight
    assert optimizer.state[weight]["momentum_buffer"].stride() == weight.stride()


def test_a_gradient_in_another_memory_format_is_caught_at_the_first_step() -> None:
    model = make_net().to(memory_format=torch.channels_last)
    optimizer = build(model, {"name": "sgd"})
    for parameter in model.parameters():
        parameter.grad = torch.zeros(parameter.shape)
    with pytest.raises(AssertionError, match="has strides"):
        optimizer.step()


def test_channels_last_training_has_the_numbers_of_contiguous() -> None:
    plain, other = make_net(), make_net().to(memory_format=torch.channels_last)
    train(plain, build(plain, {"name": "sgd"}), range(3))
    train(other, build(other, {"name": "sgd"}), range(3))
    torch.testing.assert_close(values(other), values(plain))
