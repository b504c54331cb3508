"""Weight decay by module type: each parameter once, norms and biases apart."""

from __future__ import annotations

import pytest
from torch import nn

from hpctrain.config.schema import ResNetConfig
from hpctrain.models.registry import build_model
from hpctrain.optim.param_groups import parameter_groups


def names(model: nn.Module, decay_norm_and_bias: bool = False) -> list[tuple[float, set[str]]]:
    by_id = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)
    return [(group["weight_decay"], {by_id[id(p)] for p in group["params"]}) for group in groups]


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_each_parameter_of_a_resnet_is_in_one_group(decay_norm_and_bias: bool) -> None:
    model = build_model(ResNetConfig(name="resnet18"), num_classes=10, in_channels=3, image_size=32)
    groups = parameter_groups(model, weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)
    listed = [id(p) for group in groups for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())


def test_norms_are_known_by_type_also_where_their_name_does_not_say_so() -> None:
    """torchvision's `downsample.1` is a batch norm, which a search for "bn" in names misses."""
    model = build_model(ResNetConfig(name="resnet18"), num_classes=10, in_channels=3, image_size=32)
    (decay, decayed), (none, exempt) = names(model)
    assert (decay, none) == (0.1, 0.0)
    assert {"layer2.0.downsample.1.weight", "bn1.weight", "bn1.bias", "fc.bias"} <= exempt
    assert decayed == {key for key, p in model.named_parameters() if p.ndim > 1}


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.RMSNorm(4)])
def test_every_kind_of_norm_is_exempt(norm: nn.Module) -> None:
    groups = names(nn.Sequential(norm, nn.Linear(4, 4, bias=False)))
    assert groups[0] == (0.1, {"1.weight"})
    assert groups[1][1] == {f"0.{key}" for key, _ in norm.named_parameters()}


def test_decay_may_be_asked_for_everywhere() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    assert names(model, decay_norm_and_bias=True) == [(0.1, {"0.weight", "0.bias", "1.weight", "1.bias"})]


def test_tied_parameters_count_once_and_frozen_ones_not_at_all() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    groups = parameter_groups(model, weight_decay=0.1, decay_norm_and_bias=False)
    assert [len(group["params"]) for group in groups] == [1, 3]
    assert groups[0]["params"][0] is model[0].weight


def test_a_weight_tied_to_a_norm_is_exempt() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.PReLU(4))
    model[1].weight = model[0].weight
    groups = parameter_groups(model, weight_decay=0.1, decay_norm_and_bias=False)
    assert [(group["weight_decay"], len(group["params"])) for group in groups] == [(0.0, 2)]
