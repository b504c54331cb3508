"""Residual nets (He et al. 2016, "Deep residual learning for image recognition").

Two families: the ImageNet nets of table 1 in their v1.5 form, with the stride on the 3x3 convolution (Goyal et al.
2017, section 5.1), whose parameters are named as torchvision names them, so that weights can be exchanged; and the
nets for 32-pixel pictures of section 4.2. Pictures of other sizes will do.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hpctrain.config.schema import ResNetConfig


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut; ``downsample`` gives the shortcut the branch's shape."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x))
        output: Tensor = self.relu(x.add_(shortcut))
        return output


class Bottleneck(nn.Module):
    """1x1, 3x3 (with the stride) and 1x1 convolutions, the last four times as wide, beside a shortcut."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, downsample: nn.Module | None) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x))
        output: Tensor = self.relu(x.add_(shortcut))
        return output


class Subsample(nn.Module):
    """Shortcut without parameters (option A): every other pixel, new channels zero."""

    def __init__(self, new_channels: int) -> None:
        super().__init__()
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        half = self.new_channels // 2
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, self.new_channels - half))


_Block = type[BasicBlock] | type[Bottleneck]
_DEPTHS: dict[str, tuple[_Block, tuple[int, int, int, int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """7x7 convolution and pooling, four stages of 64, 128, 256 and 512 channels, classifier."""

    def __init__(self, config: ResNetConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        block, (one, two, three, four) = _DEPTHS[config.name]
        self.conv1 = _conv(in_channels, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(block, 64, 64, one, stride=1)
        self.layer2 = _stage(block, 64 * block.expansion, 128, two, stride=2)
        self.layer3 = _stage(block, 128 * block.expansion, 256, three, stride=2)
        self.layer4 = _stage(block, 256 * block.expansion, 512, four, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        _initialise(self, config)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, num_classes] of ``images`` [batch, in_channels, height, width]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


class CifarResNet(nn.Module):
    """3x3 convolution, three stages of 16, 32 and 64 channels (three basic blocks each for 20 layers), classifier."""

    def __init__(self, config: ResNetConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = _conv(in_channels, 16, 3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _cifar_stage(16, 16, 3)
        self.layer2 = _cifar_stage(16, 32, 3)
        self.layer3 = _cifar_stage(32, 64, 3)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, num_classes)
        _initialise(self, config)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, num_classes] of ``images`` [batch, in_channels, height, width]."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(block: _Block, inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """``blocks`` blocks, the first with the stride and, where shapes differ, a projection (option B)."""
    outputs = width * block.expansion
    projection = None
    if stride != 1 or inputs != outputs:
        projection = nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))
    first = block(inputs, width, stride, projection)
    return nn.Sequential(first, *(block(outputs, width, 1, None) for _ in range(blocks - 1)))


def _cifar_stage(inputs: int, width: int, blocks: int) -> nn.Sequential:
    widens = width != inputs
    first = BasicBlock(inputs, width, 2 if widens else 1, Subsample(width - inputs) if widens else None)
    return nn.Sequential(first, *(BasicBlock(width, width, 1, None) for _ in range(blocks - 1)))


def _initialise(model: ResNet | CifarResNet, config: ResNetConfig) -> None:
    """Lay the initial values that ``config`` asks for over torch's own."""
    for module in model.modules():
        if config.he_init and isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if config.zero_gamma and isinstance(module, BasicBlock | Bottleneck):
            nn.init.zeros_(module.last_norm.weight)
    if config.fc_std is not None:
        nn.init.normal_(model.fc.weight, std=config.fc_std)
        nn.init.zeros_(model.fc.bias)
