"""What a training step is made of, built once (``hpctrain.train.build``) and handed around."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpctrain.comm.base import Communicator
from hpctrain.config.plan import Plan
from hpctrain.config.schema import Config
from hpctrain.data.types import Batch
from hpctrain.gradients.loss_scale import LossScale
from hpctrain.gradients.reducer import GradientExchange
from hpctrain.metrics.clock import PhaseClock
from hpctrain.optim.ema import Ema

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Parts:
    """Everything the step touches."""

    config: Config
    plan: Plan
    comm: Communicator
    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    exchange: GradientExchange
    #: with fp16 only
    loss_scale: LossScale | None
    ema: Ema | None
    clock: PhaseClock

    @property
    def gradient_scale(self) -> float:
        """What turns a micro-batch's gradients into their part of the step's mean."""
        return 1.0 / (self.plan.accumulation * (self.loss_scale.value if self.loss_scale else 1.0))

    def counts_rounding(self, step: int) -> bool:
        """Whether step ``step`` (from 0) is one whose rounding on the wire is counted: those that are logged."""
        return self.config.gradients.compression != "none" and (step + 1) % self.config.log.every_steps == 0

    def autocast(self) -> AbstractContextManager[object]:
        """The numbers forward computes in, by ``train.precision``."""
        dtype = AUTOCAST_DTYPES.get(self.config.train.precision)
        return torch.autocast(self.comm.device.type, dtype=dtype, enabled=dtype is not None)

    def to_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images in the model's memory format, and labels, on the device that trains."""
        layout = torch.channels_last if self.config.train.channels_last else torch.contiguous_format
        images = batch.images.to(self.comm.device, non_blocking=True).contiguous(memory_format=layout)
        return images, batch.labels.to(self.comm.device, non_blocking=True)
