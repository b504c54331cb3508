"""DALI by itself with one file: whether it decodes it, asked where an error does no harm.

In a run of one picture every error is an exception, which is not so in large runs (``hpctrain.data.dali``).
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data.dali import build_pipeline, take_output
from hpctrain.data.index import Index


class DaliTrial:
    """A ``hpctrain.data.standins.Trial``: decodes whole pictures, one at a time. Several threads may ask."""

    def __init__(self, config: DataConfig, index: Index, device: torch.device) -> None:
        self._config = config
        self._index = index
        self._device = device
        self._inputs: tuple[Any, ...] = ()
        #: kept from one trial to the next until one fails: building it takes longer than the trial
        self._pipeline: Any = None
        self._lock = threading.Lock()

    def __call__(self, sample_id: int, data: bytes) -> str | None:
        """Why DALI cannot use a sample's file, or None."""
        record = self._index.samples[sample_id]
        corner, size = np.array([[[0, 0]], [[record["width"], record["height"]]]], dtype=np.int32)
        with self._lock:
            self._inputs = [np.frombuffer(data, dtype=np.uint8)], corner, size, np.zeros(1, dtype=np.int32)
            try:
                if self._pipeline is None:
                    self._pipeline = build_pipeline(self._config, self._device, 1, 1, lambda: self._inputs, in_work=1)
                self._pipeline.schedule_run()
                take_output(self._pipeline, self._device)
            except RuntimeError:
                self._pipeline = None
                return "DALI cannot decode it, though Pillow can"
        return None

    def close(self) -> None:
        """Give up the pipeline."""
        self._pipeline = None
