"""One optimizer step: forward and backward over the micro-batches, one exchange, one update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpctrain.data.types import Batch
from hpctrain.gradients.loss_scale import finite_everywhere
from hpctrain.train.parts import Parts


def train_step(parts: Parts, batches: Iterator[Batch], step: int) -> Tensor:
    """Take the micro-batches of optimizer step ``step`` (counted from 0) and move the parameters once.

    Returns this rank's mean loss, a scalar on the device. With fp16 a gradient that is not finite on some rank
    leaves the parameters as they were, on all ranks.
    """
    clock, accumulation = parts.clock, parts.plan.accumulation
    total = torch.zeros((), device=parts.comm.device)
    for micro in range(accumulation):
        clock.enter("data")
        images, labels = parts.to_device(next(batches))
        seed_micro_batch(parts.config.seed, step * accumulation + micro, parts.comm.rank)
        with parts.exchange.accumulate(last=micro == accumulation - 1, scale=parts.gradient_scale):
            clock.enter("forward")
            with parts.autocast():
                loss = parts.criterion(parts.model(images), labels)
            clock.enter("backward")
            (loss if parts.loss_scale is None else parts.loss_scale.scale(loss)).backward()
        total += loss.detach()
    clock.enter("exchange")
    parts.exchange.finish()
    clock.enter("optimizer")
    if accept(parts):
        for group in parts.optimizer.param_groups:
            group["lr"] = parts.plan.schedule.lr_at(step)
        parts.optimizer.step()
        if parts.ema is not None:
            parts.ema.update(parts.model)
    return total / accumulation


def accept(parts: Parts) -> bool:
    """Whether the mean gradients may be used; moves the loss scale where there is one, alike on all ranks."""
    if parts.loss_scale is None:
        return True
    finite = finite_everywhere(parts.comm, parts.exchange.gradients)
    parts.loss_scale.update(finite)
    return finite


def seed_micro_batch(seed: int, micro_step: int, worker: int) -> None:
    """Make torch's randomness (dropout) a function of the micro-batch, so that there is no state to restore.

    The three numbers are spread over 64 bits by the finaliser of SplitMix64 (Steele et al. 2014, figure 16).
    """
    mixed = (seed << 40) ^ (micro_step << 16) ^ worker
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    torch.manual_seed((mixed ^ (mixed >> 31)) & (2**63 - 1))
