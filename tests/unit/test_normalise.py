"""The numbers a model is given."""

from __future__ import annotations

import pytest
import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.normalise import Normaliser, channel_statistics


@pytest.mark.parametrize("channels", [1, 3])
def test_each_channel_has_its_own_mean_and_divisor(channels: int) -> None:
    config = DataConfig(image_size=5, channels=channels)  # type: ignore[arg-type]
    pictures = torch.randint(0, 256, (2, 5, 5, channels), dtype=torch.uint8)
    images = Normaliser(config, 2, torch.device("cpu"))(pictures)
    assert images.shape == (2, channels, 5, 5)
    assert images.is_contiguous()
    for channel, (mean, std) in enumerate(zip(*channel_statistics(config), strict=True)):
        assert torch.allclose(images[:, channel], (pictures[..., channel].float() - mean) / std, atol=1e-6)


def test_grey_takes_the_averages_of_three() -> None:
    config = DataConfig(channels=1, mean=(90.0, 100.0, 110.0), std=(50.0, 60.0, 70.0))
    assert channel_statistics(config) == ((100.0,), (60.0,))
