"""Fully connected net on flattened pictures: the small model for engines, sweeps and tests, not for accuracy."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from hpctrain.config.schema import DenseConfig


class DenseNet(nn.Module):
    """Hidden layers of equal width (linear, batch norm if asked for, ReLU, dropout if asked for) and a classifier."""

    def __init__(self, config: DenseConfig, num_inputs: int, num_classes: int) -> None:
        super().__init__()
        widths = [num_inputs, *[config.neurons] * config.hidden_layers]
        self.hidden = nn.Sequential(*(_hidden_layer(config, *width) for width in pairwise(widths)))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [batch, num_classes] of ``images`` [batch, …]."""
        logits: Tensor = self.fc(self.hidden(images.flatten(1)))
        return logits


def _hidden_layer(config: DenseConfig, inputs: int, outputs: int) -> nn.Sequential:
    layer = nn.Sequential(nn.Linear(inputs, outputs, bias=not config.batch_norm))
    if config.batch_norm:
        layer.append(nn.BatchNorm1d(outputs))
    layer.append(nn.ReLU(inplace=True))
    if config.dropout > 0.0:
        layer.append(nn.Dropout(config.dropout))
    return layer
