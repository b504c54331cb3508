"""The last step of every loader: bytes of pictures to the numbers a model is given, on the device that trains.

Done here, once for all loaders, and not in their decoders: bytes are a quarter of what has to cross to a
worker's parent or to a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpctrain.config.schema import DataConfig


class Normaliser:
    """(value - mean) / std per channel, into one buffer that the next call overwrites."""

    def __init__(self, config: DataConfig, batch_size: int, device: torch.device) -> None:
        def column(values: tuple[float, ...]) -> Tensor:
            channels = values if config.channels == 3 else (sum(values) / 3,)
            return torch.tensor(channels, device=device).view(1, -1, 1, 1)

        self._mean = column(config.mean)
        self._factor = 1.0 / column(config.std)
        size = config.image_size
        self._images = torch.empty(batch_size, config.channels, size, size, device=device)

    def __call__(self, pictures: Tensor) -> Tensor:
        """float32 [batch, channels, size, size] from uint8 ``pictures`` [batch, size, size, channels]."""
        pictures = pictures.to(self._images.device, non_blocking=True)
        return torch.sub(pictures.permute(0, 3, 1, 2), self._mean, out=self._images).mul_(self._factor)
