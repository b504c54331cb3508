"""From a configuration and a job to everything the loop needs. Building happens here; nothing trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.config.plan import Plan, make_plan
from hpctrain.config.schema import Config, DataConfig
from hpctrain.data.dataset import Dataset, open_dataset
from hpctrain.data.feed import Share, eval_requests, train_requests
from hpctrain.data.index import Index
from hpctrain.data.loaders import choose, make_loader
from hpctrain.data.sampler import EpochOrder
from hpctrain.data.types import Batch, Loader
from hpctrain.gradients.build import build_exchange
from hpctrain.gradients.loss_scale import LossScale
from hpctrain.gradients.replicas import broadcast_state
from hpctrain.metrics.clock import PhaseClock
from hpctrain.models.registry import build_model
from hpctrain.optim.build import build_optimizer
from hpctrain.optim.ema import Ema
from hpctrain.topology.ranks import Topology
from hpctrain.train.evaluate import evaluate
from hpctrain.train.parts import Parts
from hpctrain.train.session import Session
from hpctrain.train.state import Evaluation, Progress


def open_data(comm: Communicator, config: Config) -> Dataset:
    """The data set of the run; a set that this program makes itself is made first where it is absent. Collective."""
    if config.data.builtin == "digits":
        on_rank_zero(comm, lambda: _make_digits(config.data))
    return open_dataset(comm, config.data, config.seed)


def _make_digits(data: DataConfig) -> None:
    from hpctrain.data.digits import make_digits

    if data.path is not None and not Path(data.path).exists():
        make_digits(Path(data.path))


def plan_for(config: Config, dataset: Dataset, topology: Topology) -> Plan:
    """The plan of ``config`` on these ranks and this data set. Raises UserError when the numbers cannot work."""
    return make_plan(
        config,
        world_size=topology.world_size,
        num_nodes=topology.num_nodes,
        train_samples=len(dataset.train),
        val_samples=len(dataset.val),
        num_classes=len(dataset.classes),
    )


def build_net(config: Config, plan: Plan, device: torch.device) -> nn.Module:
    """The model with its initial weights, a function of the seed, on ``device`` in the configured memory format."""
    torch.manual_seed(config.seed)
    model = build_model(
        config.model,
        num_classes=plan.num_classes,
        in_channels=config.data.channels,
        image_size=config.data.image_size,
    )
    model.to(device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def build_parts(config: Config, plan: Plan, session: Session) -> Parts:
    """Model, optimizer and exchange, with rank 0's parameters on every rank. Collective."""
    comm = session.comm
    model = build_net(config, plan, comm.device)
    comm.arrive()
    broadcast_state(comm, model)
    return Parts(
        config=config,
        plan=plan,
        comm=comm,
        model=model,
        criterion=nn.CrossEntropyLoss(label_smoothing=config.train.label_smoothing),
        optimizer=build_optimizer(config.optimizer, model),
        exchange=build_exchange(model, comm, config.gradients, judge=config.train.precision == "fp16"),
        loss_scale=LossScale() if config.train.precision == "fp16" else None,
        ema=Ema(model, config.train.ema_decay) if config.train.ema_decay else None,
        clock=PhaseClock(comm.device, session.watch.beat),
    )


@dataclasses.dataclass(frozen=True)
class Feeds:
    """The run's two loaders, and the streams of batches that come out of them."""

    parts: Parts
    dataset: Dataset
    train_loader: Loader
    eval_loader: Loader
    loader_reason: str
    on_eval_batch: Callable[[], None]

    def train_batches(self, progress: Progress) -> Iterator[Batch]:
        """This rank's micro-batches from where ``progress`` stands to the end of the last epoch."""
        config, plan = self.parts.config, self.parts.plan
        order = EpochOrder(
            plan.train_samples, config.seed, block=config.data.shuffle_block, window=config.data.shuffle_window
        )
        share = Share(self.parts.comm.rank, plan.workers, plan.batch_per_worker, plan.accumulation)
        requests = train_requests(
            order,
            share,
            pad=plan.last_batch == "pad",
            epochs=plan.epochs,
            epoch=progress.epoch,
            position=progress.position,
        )
        return iter(self.train_loader.load(requests))

    def evaluate(self) -> Evaluation:
        """Judge the model, or its moving average, on the whole validation part. Collective."""
        parts, comm = self.parts, self.parts.comm
        requests = eval_requests(parts.plan.val_samples, comm.rank, comm.world_size, parts.plan.batch_per_worker)
        with parts.ema.applied(parts.model) if parts.ema else nullcontext():
            return evaluate(
                parts.model,
                self.eval_loader.load(requests),
                comm,
                autocast=parts.autocast,
                on_batch=self.on_eval_batch,
            )

    @property
    def corrupt(self) -> list[str]:
        """A line for each sample of either part that this rank could not decode."""
        return self.train_loader.corrupt + self.eval_loader.corrupt

    def close(self) -> None:
        """Stop both loaders."""
        self.train_loader.close()
        self.eval_loader.close()


def build_feeds(parts: Parts, dataset: Dataset, session: Session) -> Feeds:
    """Loaders over both parts of the data set. Raises UserError where the loader asked for does not work."""
    config, plan = parts.config, parts.plan

    def loader_of(index: Index) -> Loader:
        return make_loader(
            config.data,
            index,
            seed=config.seed,
            device=session.comm.device,
            batch_size=plan.batch_per_worker,
            threads=config.data.threads or session.cores,
        )

    def alive() -> None:
        parts.clock.enter("eval")
        session.turns.begin()

    return Feeds(parts, dataset, loader_of(dataset.train), loader_of(dataset.val), choose(config.data.loader)[1], alive)
