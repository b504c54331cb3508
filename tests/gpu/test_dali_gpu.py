"""DALI on a GPU: the same windows, the same orientation, nearly the same pixels as on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.dali_loader import DaliLoader
from hpctrain.data.types import Request
from tests.needs import needs, needs_gpu
from tests.unit.pictures import encoded, index_of, picture

pytestmark = pytest.mark.gpu
needs("nvidia.dali")
needs_gpu()

#: nvJPEG and libjpeg-turbo differ in the inverse transform and in the interpolation of colour.
BOUND = 3.0


@pytest.mark.parametrize("decode", ["cpu", "gpu"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_agree_with_those_of_the_cpu(tmp_path: Path, decode: str, channels: int) -> None:
    files = [encoded(picture(200 + 10 * n, 150, n), orientation) for n, orientation in enumerate(range(1, 9))]
    files.append(encoded(picture(64, 48), image_format="PNG"))
    index = index_of(tmp_path, files)
    options: dict[str, Any] = {"image_size": 64, "channels": channels, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    requests = [Request(np.arange(len(files)), epoch, len(files), "train") for epoch in range(20)]

    def shown(device: str, **more: Any) -> list[torch.Tensor]:
        config = DataConfig(**options, **more)
        size = len(files)
        loader = DaliLoader(config, index, seed=1, device=torch.device(device), batch_size=size, threads=2)
        images = [batch.images.clone() for batch in loader.load(requests)]
        loader.close()
        assert images[0].device.type == device
        return [image.cpu() for image in images]

    reference = shown("cpu")
    first, second = shown("cuda", decode=decode), shown("cuda", decode=decode)
    for one, again, expected in zip(first, second, reference, strict=True):
        assert torch.equal(one, again)
        assert (one - expected).abs().mean(dim=(1, 2, 3)).max() < BOUND
