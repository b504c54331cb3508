"""From arithmetic to requests: which samples a rank loads for each micro-batch of training and evaluation.

It deals out positions of an epoch's order (``hpctrain.data.sampler``); it reads nothing, and the numbers it
is given are those of the plan. The samples of a step depend on the global batch alone: worker w of W takes, as
its micro-batch a, the slice [(a * W + w) * B, + B) of the step's positions, so that equal W * A * B means
equal steps whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hpctrain.config.plan import count_steps
from hpctrain.data.sampler import EpochOrder
from hpctrain.data.types import Request


@dataclass(frozen=True, slots=True)
class Share:
    """One worker's part of every global batch: ``accumulation`` micro-batches of ``batch`` samples."""

    worker: int
    workers: int
    batch: int
    accumulation: int = 1

    @property
    def batch_global(self) -> int:
        """Samples of one optimizer step, over all workers."""
        return self.workers * self.batch * self.accumulation


def steps_left(num_samples: int, batch_global: int, position: int, pad: bool) -> int:
    """Steps from ``position`` to the end of an epoch, the last partial batch left out or (``pad``) filled up."""
    return count_steps(max(num_samples - position, 0), batch_global, pad=pad)


def train_requests(
    order: EpochOrder, share: Share, *, pad: bool, epochs: int, epoch: int = 0, position: int = 0
) -> Iterator[Request]:
    """Requests of one worker from ``position`` of ``epoch`` to the end of the last of ``epochs``, in order.

    ``position`` may be any number of samples into the epoch: what follows is what was not seen before it. With
    ``pad``, the last batch of an epoch is filled up from the start of the same epoch's order, and ``valid``
    counts the samples before that (0 in a slice that lies wholly beyond the end).
    """
    while epoch < epochs:
        for _ in range(steps_left(order.num_samples, share.batch_global, position, pad)):
            for micro in range(share.accumulation):
                start = position + (micro * share.workers + share.worker) * share.batch
                yield _train_request(order, epoch, start, share.batch)
            position += share.batch_global
        epoch, position = epoch + 1, 0


def _train_request(order: EpochOrder, epoch: int, start: int, batch: int) -> Request:
    valid = min(max(order.num_samples - start, 0), batch)
    pieces = [order.ids(epoch, start, start + valid)] if valid else []
    filled, position = valid, (start + valid) % order.num_samples
    while filled < batch:
        taken = min(batch - filled, order.num_samples - position)
        pieces.append(order.ids(epoch, position, position + taken))
        filled, position = filled + taken, 0
    return Request(np.concatenate(pieces), epoch, valid, "train")


def eval_requests(num_samples: int, rank: int, world_size: int, batch: int) -> Iterator[Request]:
    """Requests of one rank for one evaluation: together the ranks see each sample exactly once.

    All ranks make the same number of requests, all of ``batch`` samples; those beyond the end repeat sample 0
    and lie outside ``valid``.
    """
    for start in range(rank * batch, -(-num_samples // (world_size * batch)) * world_size * batch, world_size * batch):
        ids = np.arange(start, start + batch, dtype=np.int64)
        ids[ids >= num_samples] = 0
        yield Request(ids, 0, min(max(num_samples - start, 0), batch), "eval")
