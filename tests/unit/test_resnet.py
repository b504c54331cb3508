"""ResNets: names, shapes and counts of the published nets, and the options of their start."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from hpctrain.config.schema import ResNetConfig
from hpctrain.models.registry import build_model

# He et al. 2016, table 1: blocks a stage, and whether a block is a bottleneck. The counts of parameters and of
# tensors are those of torchvision's models with 1,000 classes.
PUBLISHED = {
    "resnet18": ((2, 2, 2, 2), False, 11_689_512, 62, 122),
    "resnet34": ((3, 4, 6, 3), False, 21_797_672, 110, 218),
    "resnet50": ((3, 4, 6, 3), True, 25_557_032, 161, 320),
    "resnet101": ((3, 4, 23, 3), True, 44_549_160, 314, 626),
    "resnet152": ((3, 8, 36, 3), True, 60_192_808, 467, 932),
}


def build(name: str, num_classes: int = 1000, in_channels: int = 3, **options: object) -> nn.Module:
    config = ResNetConfig.model_validate({"name": name, **options})
    return build_model(config, num_classes=num_classes, in_channels=in_channels, image_size=32)


def norm_entries(name: str, width: int) -> dict[str, tuple[int, ...]]:
    vectors = {f"{name}.{key}": (width,) for key in ("weight", "bias", "running_mean", "running_var")}
    return {**vectors, f"{name}.num_batches_tracked": ()}


def torchvision_entries(blocks: tuple[int, ...], bottleneck: bool) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of torchvision's state_dict, in its order, from the published architecture."""
    expansion = 4 if bottleneck else 1
    entries: dict[str, tuple[int, ...]] = {"conv1.weight": (64, 3, 7, 7), **norm_entries("bn1", 64)}
    inputs = 64
    for stage, (count, width) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), start=1):
        outputs = width * expansion
        for block in range(count):
            at = f"layer{stage}.{block}"
            convs = [(width, inputs, 3), (width, width, 3)]
            if bottleneck:
                convs = [(width, inputs, 1), (width, width, 3), (outputs, width, 1)]
            for number, (wide, deep, kernel) in enumerate(convs, start=1):
                entries[f"{at}.conv{number}.weight"] = (wide, deep, kernel, kernel)
                entries |= norm_entries(f"{at}.bn{number}", wide)
            if block == 0 and (stage > 1 or bottleneck):
                entries[f"{at}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                entries |= norm_entries(f"{at}.downsample.1", outputs)
            inputs = outputs
    return {**entries, "fc.weight": (1000, inputs), "fc.bias": (1000,)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_is_that_of_torchvision(name: str) -> None:
    blocks, bottleneck, num_parameters, num_tensors, num_entries = PUBLISHED[name]
    with torch.device("meta"):
        model = build(name, he_init=False)
    state = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert list(state.items()) == list(torchvision_entries(blocks, bottleneck).items())
    assert len(state) == num_entries
    assert len(list(model.parameters())) == num_tensors
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_literal_keys_of_resnet18_and_resnet50() -> None:
    """A few of torchvision's keys, written out, so that the rules above cannot be wrong in the same way as the net."""
    with torch.device("meta"):
        small = build("resnet18", he_init=False).state_dict()
        large = build("resnet50", he_init=False).state_dict()
    assert list(small)[:7] == [
        "conv1.weight",
        "bn1.weight",
        "bn1.bias",
        "bn1.running_mean",
        "bn1.running_var",
        "bn1.num_batches_tracked",
        "layer1.0.conv1.weight",
    ]
    assert small["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert small["layer4.1.bn2.running_var"].shape == (512,)
    assert "layer1.0.downsample.0.weight" not in small
    assert large["layer1.0.conv1.weight"].shape == (64, 64, 1, 1)
    assert large["layer1.0.downsample.1.num_batches_tracked"].shape == ()
    assert large["layer3.5.conv3.weight"].shape == (1024, 256, 1, 1)
    assert large["fc.weight"].shape == (1000, 2048)


def test_the_stride_is_on_the_three_by_three() -> None:
    """Version 1.5 of the bottleneck (Goyal et al. 2017, section 5.1)."""
    with torch.device("meta"):
        model = build("resnet50", he_init=False)
    strided = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)]
    blocks = [f"layer{stage}.0.{conv}" for stage in (2, 3, 4) for conv in ("conv2", "downsample.0")]
    assert strided == ["conv1", *blocks]


@pytest.mark.parametrize(("name", "channels"), list(itertools.product(("resnet18", "resnet50", "resnet20"), (1, 3))))
def test_pictures_become_logits_and_every_parameter_gets_a_gradient(name: str, channels: int) -> None:
    model = build(name, num_classes=7, in_channels=channels)
    logits = model(torch.randn(2, channels, 32, 32))
    assert logits.shape == (2, 7)
    logits.square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_cifar_resnet20_is_the_published_one() -> None:
    """He et al. 2016, section 4.2: 0.27 million parameters, shortcuts without any."""
    model = build("resnet20", num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert not [key for key in model.state_dict() if "downsample" in key]
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 20


def test_option_a_subsamples_and_pads_with_zeros() -> None:
    from hpctrain.models.resnet import Subsample

    x = torch.arange(2 * 2 * 4 * 4, dtype=torch.float32).view(2, 2, 4, 4)
    padded = Subsample(new_channels=2)(x)
    assert padded.shape == (2, 4, 2, 2)
    assert torch.equal(padded[:, 1:3], x[:, :, ::2, ::2])
    assert not padded[:, 0].any()
    assert not padded[:, 3].any()


def last_gammas(model: nn.Module, name: str) -> list[Tensor]:
    return [p for key, p in model.named_parameters() if key.startswith("layer") and key.endswith(f"{name}.weight")]


def test_zero_gamma_silences_every_branch_and_nothing_else() -> None:
    for name, last in (("resnet18", "bn2"), ("resnet50", "bn3"), ("resnet20", "bn2")):
        model = build(name, zero_gamma=True)
        gammas = last_gammas(model, last)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(not gamma.any() for gamma in gammas)
        assert sum(not m.weight.any() for m in norms) == len(gammas)


def test_he_init_has_the_spread_of_the_paper() -> None:
    """Standard deviation sqrt(2 / (kernel area x output channels))."""
    torch.manual_seed(1)
    weight = build("resnet18").get_parameter("layer2.0.conv1.weight").detach()
    assert float(weight.std()) == pytest.approx(math.sqrt(2 / (9 * 128)), rel=0.02)
    torch.manual_seed(1)
    default = build("resnet18", he_init=False).get_parameter("layer2.0.conv1.weight").detach()
    assert float(default.std()) == pytest.approx(1 / math.sqrt(3 * 9 * 64), rel=0.02)


def test_fc_std_sets_the_classifier() -> None:
    fc = build("resnet18", fc_std=0.01).get_submodule("fc")
    assert isinstance(fc, nn.Linear)
    assert float(fc.weight.detach().std()) == pytest.approx(0.01, rel=0.02)
    assert not fc.bias.any()


def test_the_seed_decides_the_start() -> None:
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(torch.cat([p.flatten() for p in build("resnet20", num_classes=10).parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])
