"""One optimizer step: forward and backward over the micro-batches, one exchange, one update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hpctrain.data.types import Batch
from hpctrain.gradients.verdict import Verdict
from hpctrain.train.parts import Parts


def train_step(parts: Parts, batches: Iterator[Batch], step: int) -> Tensor:
    """Take the micro-batches of optimizer step ``step`` (counted from 0) and move the parameters once.

    Returns this rank's mean loss, a scalar on the device. Where gradients are judged (fp16 anywhere, or clipping), one
    that is not finite on some rank leaves the parameters as they were, on all ranks.
    """
    clock, accumulation = parts.clock, parts.plan.accumulation
    total = torch.zeros((), device=parts.comm.device)
    for micro in range(accumulation):
        clock.enter("data")
        images, labels = parts.to_device(next(batches))
        seed_micro_batch(parts.config.seed, step * accumulation + micro, parts.comm.rank)
        last = micro == accumulation - 1
        with parts.exchange.accumulate(last=last, scale=parts.gradient_scale, count=parts.counts_rounding(step)):
            clock.enter("forward")
            with parts.autocast():
                loss = parts.criterion(parts.model(images), labels)
            clock.enter("backward")
            (loss if parts.loss_scale is None else parts.loss_scale.scale(loss)).backward()
        total += loss.detach()
    clock.enter("exchange")
    verdict = parts.exchange.finish().verdict
    clock.enter("optimizer")
    if accept(parts, verdict):
        for group in parts.optimizer.param_groups:
            group["lr"] = parts.plan.schedule.lr_at(step)
        parts.optimizer.step()
        if parts.ema is not None:
            parts.ema.update(parts.model)
    return total / accumulation


def accept(parts: Parts, verdict: Verdict | None) -> bool:
    """Whether the mean gradients may be used, alike on all ranks; moves the loss scale, and clips, where there is one.

    Without a verdict nobody asked: full-range gradients that are not finite end the run by its loss.
    """
    if verdict is None:
        return True
    if parts.loss_scale is not None:
        parts.loss_scale.update(verdict.finite)
    clip_norm = parts.config.gradients.clip_norm
    if clip_norm is not None and verdict.norm is not None and verdict.finite:
        parts.exchange.clip_(clip_norm, verdict.norm)
    return verdict.finite


def seed_micro_batch(seed: int, micro_step: int, worker: int) -> None:
    """Make torch's randomness (dropout) a function of the micro-batch, so that there is no state to restore.

    The three numbers are spread over 64 bits by the finaliser of SplitMix64 (Steele et al. 2014, figure 16).
    """
    mixed = (seed << 40) ^ (micro_step << 16) ^ worker
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    torch.manual_seed((mixed ^ (mixed >> 31)) & (2**63 - 1))
