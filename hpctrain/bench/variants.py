"""The training loops that `hpctrain bench step` compares: ours as a run takes it, and three written by hand.

All start from the same weights and take the same batches with the same optimizer at the same rate. The loops by
hand are what a careful person writes for this one job: no clock, no log, no watch, no check, pictures ready in
their memory format.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpctrain.comm.horovod_engine import HorovodCommunicator, ReleasedHorovod
from hpctrain.data.dataset import Dataset
from hpctrain.gradients.replicas import broadcast_state
from hpctrain.metrics.progress import SilentDisplay
from hpctrain.optim.build import build_optimizer
from hpctrain.train.build import build_feeds, build_net
from hpctrain.train.journal import Journal
from hpctrain.train.loop import Loop
from hpctrain.train.parts import Parts
from hpctrain.train.run import open_sinks
from hpctrain.train.rundir import RunDirectory
from hpctrain.train.saver import Saver
from hpctrain.train.session import Session
from hpctrain.train.state import Progress

#: batches that the loops by hand take in turn: the first ones of ours
BATCHES = 16

Ready = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Variant:
    """A loop under measurement. ``step`` takes one optimizer step, between entering and leaving ``turn``."""

    name: str
    what: str
    model: nn.Module
    step: Callable[[], object]
    turn: Callable[[], AbstractContextManager[object]] = nullcontext
    #: whether its ranks exchange gradients, so that their parameters stay equal
    exchanges: bool = True


def make_loop(parts: Parts, dataset: Dataset, session: Session, folder: Path) -> Loop:
    """The loop of `hpctrain train` on synthetic batches, which logs to files in ``folder`` and shows nothing."""
    progress = Progress()
    feeds = build_feeds(parts, dataset, session)
    run = RunDirectory(folder)
    sinks = open_sinks(parts.config, run, progress) if parts.comm.rank == 0 else []
    journal = Journal(parts, feeds, SilentDisplay(), sinks, folder)
    saver = Saver(parts, run.checkpoints, progress.step)
    return Loop(parts, progress, feeds.train_batches(progress), feeds.evaluate, journal, saver, session.turns)


def ready_batches(parts: Parts, dataset: Dataset, session: Session) -> list[Ready]:
    """The first batches of the loop, on the device and in the model's memory format."""
    stream = build_feeds(parts, dataset, session).train_batches(Progress())
    return [parts.to_device(batch) for batch in itertools.islice(stream, BATCHES)]


def ours(loop: Loop) -> Variant:
    """The step of a run: feeding, clock, watch, exchange, update, log and comparison of replicas when due."""

    def step() -> None:
        if not loop.parts.plan.steps_left_in_epoch(loop.progress.position):
            loop.progress.next_epoch()
        loop.step()

    return Variant("hpctrain", "the step of `hpctrain train`", loop.parts.model, step)


class ByHand:
    """Zero, forward, loss, backward, then ``update``: the part that the loops by hand have in common."""

    def __init__(self, parts: Parts, batches: Sequence[Ready]) -> None:
        self.parts = parts
        self.model = build_net(parts.config, parts.plan, parts.comm.device)
        self.optimizer: Any = build_optimizer(parts.config.optimizer, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = parts.plan.lr_start
        self.scaler = torch.amp.GradScaler(parts.comm.device.type, enabled=parts.loss_scale is not None)
        self._batches: Iterator[Ready] = itertools.cycle(batches)

    def step(self, update: Callable[[], object]) -> None:
        images, labels = next(self._batches)
        self.optimizer.zero_grad()
        with self.parts.autocast():
            loss = self.parts.criterion(self.model(images), labels)
        self.scaler.scale(loss).backward()
        update()
        self.scaler.update()


def bare(parts: Parts, batches: Sequence[Ready]) -> Variant:
    """One all-reduce of one flat buffer through the run's engine, after the backward pass."""
    loop, comm = ByHand(parts, batches), parts.comm
    broadcast_state(comm, loop.model)
    parameters = list(loop.model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.empty(sum(sizes), device=comm.device)

    def exchange() -> None:
        # As they lie in memory, and back as views: one copy, and none for a change of format.
        torch.cat([p.grad.as_strided((p.numel(),), (1,)) for p in parameters if p.grad is not None], out=flat)
        comm.all_reduce_(flat).wait()
        flat.div_(comm.world_size)
        for parameter, part in zip(parameters, torch.split(flat, sizes), strict=True):
            parameter.grad = part.as_strided(parameter.size(), parameter.stride())

    def update() -> None:
        if comm.world_size > 1:
            exchange()
        loop.scaler.step(loop.optimizer)

    return Variant("bare", "by hand, one flat all-reduce after backward", loop.model, lambda: loop.step(update))


def bare_local(parts: Parts, batches: Sequence[Ready]) -> Variant:
    """The same without any exchange: what is left of a step when communication is free."""
    loop = ByHand(parts, batches)
    broadcast_state(parts.comm, loop.model)

    def update() -> None:
        loop.scaler.step(loop.optimizer)

    return Variant("bare_local", "by hand, ranks on their own", loop.model, lambda: loop.step(update), exchanges=False)


def horovod(parts: Parts, comm: HorovodCommunicator, batches: Sequence[Ready]) -> Variant:
    """Horovod's DistributedOptimizer as its documentation shows it, with its own fusion and cycle time."""
    released = ReleasedHorovod(comm)
    loop = ByHand(parts, batches)
    # It takes contiguous tensors only. Convolutions follow the pictures' format, whatever that of their weights.
    loop.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with released.turn() as hvd:
        hvd.broadcast_parameters(loop.model.state_dict(), root_rank=0)
        loop.optimizer = hvd.DistributedOptimizer(loop.optimizer, named_parameters=loop.model.named_parameters())

    def update() -> None:
        if not loop.scaler.is_enabled():
            loop.optimizer.step()
            return
        # As in its examples/pytorch/pytorch_mnist.py: the scaler has to see the gradients of all ranks.
        loop.optimizer.synchronize()
        loop.scaler.unscale_(loop.optimizer)
        with loop.optimizer.skip_synchronize():
            loop.scaler.step(loop.optimizer)

    return Variant(
        "horovod", "by hand, with hvd.DistributedOptimizer", loop.model, lambda: loop.step(update), released.turn
    )
