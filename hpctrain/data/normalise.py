"""From bytes to the numbers a model is given, where the decoder does not do it itself."""

from __future__ import annotations

import torch
from torch import Tensor

from hpctrain.config.schema import DataConfig


def channel_statistics(config: DataConfig) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and divisor of each channel, on the scale 0-255; a single grey channel takes the averages of three."""
    if config.channels == 3:
        return config.mean, config.std
    return (sum(config.mean) / 3,), (sum(config.std) / 3,)


class Normaliser:
    """(value - mean) / std per channel, on the device that trains: bytes are a quarter of what has to get there.

    Writes into one buffer that the next call overwrites.
    """

    def __init__(self, config: DataConfig, batch_size: int, device: torch.device) -> None:
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in channel_statistics(config))
        self._mean, self._factor = mean, 1.0 / std
        size = config.image_size
        self._images = torch.empty(batch_size, config.channels, size, size, device=device)

    def __call__(self, pictures: Tensor) -> Tensor:
        """float32 [batch, channels, size, size] from uint8 ``pictures`` [batch, size, size, channels]."""
        pictures = pictures.to(self._images.device, non_blocking=True)
        return torch.sub(pictures.permute(0, 3, 1, 2), self._mean, out=self._images).mul_(self._factor)
