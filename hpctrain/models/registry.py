"""From the `model` section of a configuration to a module on the CPU; a net's file is imported when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hpctrain.config.schema import DenseConfig, ModelConfig, ResNetConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """What goes in (a square of ``image_size`` pixels with ``in_channels``) and how many classes come out."""

    num_classes: int
    in_channels: int
    image_size: int


def _dense(config: DenseConfig, shape: Shape) -> nn.Module:
    from hpctrain.models.dense import DenseNet

    return DenseNet(config, shape.in_channels * shape.image_size**2, shape.num_classes)


def _cifar_resnet(config: ResNetConfig, shape: Shape) -> nn.Module:
    from hpctrain.models.resnet import CifarResNet

    return CifarResNet(config, shape.in_channels, shape.num_classes)


def _resnet(config: ResNetConfig, shape: Shape) -> nn.Module:
    from hpctrain.models.resnet import ResNet

    return ResNet(config, shape.in_channels, shape.num_classes)


_BUILDERS: dict[str, Callable[[Any, Shape], nn.Module]] = {
    "dense": _dense,
    "resnet20": _cifar_resnet,
    "resnet18": _resnet,
    "resnet34": _resnet,
    "resnet50": _resnet,
    "resnet101": _resnet,
    "resnet152": _resnet,
}


def build_model(config: ModelConfig, *, num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """The net of ``config``: pictures [batch, in_channels, image_size, image_size] to logits [batch, num_classes].

    Its initial parameters follow from torch's global seed alone.
    """
    return _BUILDERS[config.name](config, Shape(num_classes, in_channels, image_size))
