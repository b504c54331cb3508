"""Pictures that cost nothing: a few random batches made once, on the device, and handed out in turn.

It measures everything but the input. What it gives is a function of seed and request like any loader's, but
nothing can be learnt from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.hashing import stream_key
from hpctrain.data.index import Index
from hpctrain.data.types import Batch, Request
from hpctrain.topology.probe import Probe

#: Distinct batches: enough that loss and gradients vary from step to step as they do on real pictures.
BATCHES = 4

_PICTURES = 5


class SyntheticLoader:
    """See ``hpctrain.data.types.Loader``. Which batch a request gets follows from its first sample id."""

    name = "synthetic"

    def __init__(
        self, config: DataConfig, index: Index, *, seed: int, device: torch.device, batch_size: int, threads: int
    ) -> None:
        self.corrupt: list[str] = []
        self._index = index
        self._device = device
        shape = (BATCHES, batch_size, config.channels, config.image_size, config.image_size)
        # A generator of the CPU, so that all devices see the same pictures.
        generator = torch.Generator().manual_seed(stream_key(seed, _PICTURES) >> 1)
        self._images = torch.randn(shape, generator=generator).to(device)

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """Yield one batch a request."""
        for request in requests:
            labels = torch.from_numpy(self._index.labels[request.sample_ids])
            images = self._images[int(request.sample_ids[0]) % BATCHES]
            yield Batch(images, labels.to(self._device), request, request.sample_ids)

    def close(self) -> None:
        return


def probe() -> Probe:
    """It always works."""
    return Probe("synthetic", True)
