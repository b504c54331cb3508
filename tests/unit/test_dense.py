"""The dense net: its layers follow the configuration, and its start follows the seed."""

from __future__ import annotations

import torch
from torch import nn

from hpctrain.config.schema import DenseConfig
from hpctrain.models.registry import build_model


def build(**keys: object) -> nn.Module:
    config = DenseConfig.model_validate({"name": "dense", **keys})
    return build_model(config, num_classes=10, in_channels=1, image_size=28)


def test_the_net_of_the_report_has_its_parameters() -> None:
    """784 inputs, one hidden layer of 128, 10 classes."""
    net = build()
    assert sum(p.numel() for p in net.parameters()) == 784 * 128 + 128 + 128 * 10 + 10
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_layers_and_options_are_those_asked_for() -> None:
    net = build(hidden_layers=3, neurons=5, dropout=0.5, batch_norm=True)
    kinds = [type(module) for module in net.modules() if not list(module.children())]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout] * 3 + [nn.Linear]
    assert [type(m) for m in build(hidden_layers=0).modules() if isinstance(m, nn.Linear)] == [nn.Linear]


def test_dropout_acts_in_training_alone() -> None:
    net = build(dropout=0.9, neurons=64)
    images = torch.ones(1, 1, 28, 28)
    assert not torch.equal(net(images), net(images))
    net.eval()
    assert torch.equal(net(images), net(images))


def test_the_seed_decides_the_start() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in build().parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
