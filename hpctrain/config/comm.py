"""The section `comm`: the engine that moves buffers, and what it is told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from hpctrain.config.section import NonNegativeFloat, PositiveFloat, Section


class HorovodConfig(Section):
    """Horovod's own knobs. None leaves them as our engine has them, whose buckets come fused already."""

    fusion_threshold_mib: NonNegativeFloat | None = None
    """HOROVOD_FUSION_THRESHOLD: buffers that Horovod packs into one; none is 0, more is not reproducible"""
    cycle_time_ms: NonNegativeFloat | None = None
    """HOROVOD_CYCLE_TIME: pause between its rounds of negotiation; none is Horovod's own, 1 ms"""
    hierarchical_allreduce: bool | None = None
    """HOROVOD_HIERARCHICAL_ALLREDUCE: NCCL within a host, MPI between hosts; on GPUs and over MPI only"""


class CommConfig(Section):
    """The engine that moves buffers between ranks."""

    engine: Literal["auto", "horovod", "mpi", "torch", "serial"] = "auto"
    """auto picks by launcher and by what is installed, Horovod first"""
    timeout_s: PositiveFloat = 50.0
    """how long a rank may show no progress before the job ends, within ten seconds more, and names it"""
    startup_timeout_s: PositiveFloat = 300.0
    """the same until the first step is over"""
    horovod: HorovodConfig = HorovodConfig()

    def conflicts(self) -> Iterator[str]:
        for key, value in self.horovod.model_dump().items():
            if value is not None and self.engine not in ("auto", "horovod"):
                yield f"horovod.{key} is a setting of Horovod's, but engine is {self.engine}: leave it out"
