"""Exact evaluation: every validation sample counted once, summed over ranks, divided once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpctrain.comm.base import Communicator
from hpctrain.data.types import Batch
from hpctrain.train.state import Evaluation


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    comm: Communicator,
    *,
    autocast: Callable[[], AbstractContextManager[object]],
    on_batch: Callable[[], None],
) -> Evaluation:
    """Top-1, top-5 and mean loss of ``model`` over this rank's ``batches`` and everybody else's.

    Each rank gives its share of the set in batches of one size (the rest of the last one is filler that
    ``Request.valid`` leaves out), so the same pictures meet the same kernels for any number of ranks. Pictures that
    stand in for corrupt ones are not counted. Counts are summed as float64, exact below 2**53. ``on_batch`` is
    called once a batch, as a sign of life. Collective.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=comm.device)
    for batch in batches:
        images = batch.images.to(comm.device, non_blocking=True)
        labels = batch.labels.to(comm.device, non_blocking=True)
        with autocast():
            logits = model(images)
        counted = torch.from_numpy(_counted(batch)).to(comm.device)
        counts += _count(logits.float()[counted], labels[counted])
        on_batch()
    model.train(was_training)
    comm.arrive()
    comm.all_reduce_(counts).wait()
    top1, top5, loss, seen = counts.tolist()
    return Evaluation(top1=top1 / seen, top5=top5 / seen, loss=loss / seen, seen=int(seen))


def _counted(batch: Batch) -> np.ndarray:
    """Positions in the batch that show a sample of the set, and the one that was asked for."""
    asked, shown = batch.request.sample_ids, batch.sample_ids
    return np.flatnonzero((asked == shown)[: batch.request.valid])


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """[correct at 1, correct at 5, summed loss, seen] over all rows of ``logits`` [n, classes]."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best.eq(labels.unsqueeze(1))
    loss = functional.cross_entropy(logits.double(), labels, reduction="sum")
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss, torch.tensor(len(labels), device=logits.device)]).double()
