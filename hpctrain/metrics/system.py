"""Memory and CPU of this process over the run, and whether memory grows with the steps.

One process only: memory of other ranks is in their own samples, of the machine in none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import psutil

if TYPE_CHECKING:
    import torch

_MAX_SAMPLES = 512


class SystemUse:
    """Sampled at logged steps; costs some microseconds and keeps at most 512 samples."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._process.cpu_percent(None)
        self._samples: list[tuple[int, int]] = []
        self._stride = 1
        self._seen = 0
        self._peak_rss_bytes = 0

    def sample(self, step: int) -> dict[str, float]:
        """Use at ``step``: counters for its line in the log.

        ``rss_bytes`` resident memory; ``cpu_cores`` cores kept busy since the last sample; on a GPU
        ``gpu_allocated_bytes`` and ``gpu_peak_bytes`` of torch's own allocator on this rank's device.
        """
        rss_bytes = self._process.memory_info().rss
        self._peak_rss_bytes = max(self._peak_rss_bytes, rss_bytes)
        self._keep(step, rss_bytes)
        use: dict[str, float] = {"rss_bytes": rss_bytes, "cpu_cores": self._process.cpu_percent(None) / 100}
        if self._device.type == "cuda":
            import torch

            use["gpu_allocated_bytes"] = torch.cuda.memory_allocated(self._device)
            use["gpu_peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return use

    def to_record(self) -> dict[str, float | None]:
        """The section ``system`` of a record."""
        return {
            "memory_slope_bytes_per_step": self.memory_slope_bytes_per_step(),
            "rss_peak_bytes": self._peak_rss_bytes,
        }

    def memory_slope_bytes_per_step(self) -> float | None:
        """Growth of resident memory: least squares over the second half of the samples, so that filling of
        caches and queues at the start does not count. None with fewer than four samples.
        """
        if len(self._samples) < 4:
            return None
        steps, rss_bytes = np.array(self._samples[len(self._samples) // 2 :], dtype=np.float64).T
        centred = steps - steps.mean()
        spread = float(centred @ centred)
        return float(centred @ (rss_bytes - rss_bytes.mean())) / spread if spread else None

    def _keep(self, step: int, rss_bytes: int) -> None:
        """Keep every ``_stride``-th sample; when there are too many, every second of those."""
        if self._seen % self._stride == 0:
            self._samples.append((step, rss_bytes))
            if len(self._samples) > _MAX_SAMPLES:
                self._samples = self._samples[::2]
                self._stride *= 2
        self._seen += 1
