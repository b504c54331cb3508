"""One optimizer step: forward and backward over the micro-batches, one exchange, one update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpctrain.data.types import Batch
from hpctrain.train.parts import Parts


def train_step(parts: Parts, batches: Iterator[Batch], step: int) -> Tensor:
    """Take the micro-batches of optimizer step ``step`` (counted from 0) and move the parameters once.

    Returns this rank's mean loss, a scalar on the device; nothing waits for the device here. With fp16 a
    non-finite gradient leaves the parameters as they were, on all ranks alike.
    """
    clock, plan = parts.clock, parts.plan
    parts.exchange.zero()
    total = torch.zeros((), device=parts.comm.device)
    for micro in range(plan.accumulation):
        clock.enter("data")
        images, labels = parts.to_device(next(batches))
        seed_micro_batch(parts.config.seed, step * plan.accumulation + micro, parts.comm.rank)
        clock.enter("forward")
        with parts.autocast():
            loss = parts.criterion(parts.model(images), labels) / plan.accumulation
        clock.enter("backward")
        with parts.exchange.accumulate(last=micro == plan.accumulation - 1):
            parts.loss_scale.scale(loss).backward()
        total += loss.detach()
    clock.enter("exposed_comm")
    parts.exchange.finish(parts.loss_scale.inverse)
    clock.enter("optimizer")
    for group in parts.optimizer.param_groups:
        group["lr"] = parts.schedule.lr_at(step)
    if parts.loss_scale.accept(parts.exchange):
        parts.optimizer.step()
        if parts.ema is not None:
            parts.ema.update(parts.model)
    return total


def seed_micro_batch(seed: int, micro_step: int, worker: int) -> None:
    """Make torch's randomness (dropout) a function of the micro-batch, so that there is no state to restore.

    The three numbers are spread over 64 bits by the finaliser of SplitMix64 (Steele et al. 2014, figure 16).
    """
    mixed = (seed << 40) ^ (micro_step << 16) ^ worker
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    torch.manual_seed((mixed ^ (mixed >> 31)) & (2**63 - 1))
