"""The arithmetic of a run: batches, steps and rates from the configuration and a handful of counts.

Nothing here reads data or asks an engine; given equal numbers every rank comes to the same plan, before the
first step. A request whose numbers cannot work is refused here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from hpctrain.config.schema import Config, GradientsConfig
from hpctrain.errors import UserError
from hpctrain.schedules import Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run is going to do. Samples are counted over all workers, steps are optimizer steps."""

    world_size: int
    nodes: int
    workers: int
    batch_per_worker: int
    accumulation: int
    batch_global: int
    train_samples: int
    val_samples: int
    num_classes: int
    steps_per_epoch: int
    epochs: int
    #: epochs x steps_per_epoch, or train.max_steps where that is less
    total_steps: int
    last_batch: Literal["drop", "pad"]
    #: none stands for the end of each epoch
    checkpoint_every_steps: int | None
    checkpoint_mtbf_hours: float | None
    schedule: Schedule

    @property
    def samples_dropped(self) -> int:
        """Samples that an epoch leaves out."""
        return max(0, self.train_samples - self.steps_per_epoch * self.batch_global)

    @property
    def samples_padded(self) -> int:
        """Samples that an epoch takes a second time to fill its last global batch."""
        return max(0, self.steps_per_epoch * self.batch_global - self.train_samples)

    @property
    def lr_start(self) -> float:
        """Learning rate of the first step."""
        return self.schedule.lr_at(0)

    @property
    def lr_peak(self) -> float:
        """Learning rate after warm-up, scaled by batch where the configuration asks for it."""
        return self.schedule.peak

    @property
    def lr_end(self) -> float:
        """Learning rate of the last step."""
        return self.schedule.lr_at(self.total_steps - 1)

    def steps_left_in_epoch(self, position: int) -> int:
        """Steps from sample ``position`` of an epoch's order to its end.

        ``position`` may come from a run with another global batch: the rule for the last batch (drop or pad)
        then holds for the samples that are left.
        """
        assert position >= 0, position
        return count_steps(max(0, self.train_samples - position), self.batch_global, pad=self.last_batch == "pad")

    def to_record(self) -> dict[str, Any]:
        """The plan of record.json; the first seven keys are stable."""
        return {
            "world_size": self.world_size,
            "nodes": self.nodes,
            "workers": self.workers,
            "batch_per_worker": self.batch_per_worker,
            "batch_global": self.batch_global,
            "steps_per_epoch": self.steps_per_epoch,
            "epochs": self.epochs,
            "accumulation": self.accumulation,
            "total_steps": self.total_steps,
            "train_samples": self.train_samples,
            "val_samples": self.val_samples,
            "num_classes": self.num_classes,
            "samples_dropped": self.samples_dropped,
            "samples_padded": self.samples_padded,
            "lr": {"start": self.lr_start, "peak": self.lr_peak, "end": self.lr_end},
            "checkpoint_every_steps": self.checkpoint_every_steps,
            "checkpoint_mtbf_hours": self.checkpoint_mtbf_hours,
        }

    def describe(self) -> list[tuple[str, str]]:
        """The plan for people: rows of a name and a value."""
        remainder = (
            f"{self.samples_padded:,} padded" if self.last_batch == "pad" else f"{self.samples_dropped:,} dropped"
        )
        return [
            ("ranks", f"{self.world_size:,}"),
            ("nodes", f"{self.nodes:,}"),
            ("workers", f"{self.workers:,}"),
            ("batch per worker", f"{self.batch_per_worker:,}"),
            ("accumulation", f"{self.accumulation:,}"),
            ("global batch", f"{self.batch_global:,}"),
            ("training samples", f"{self.train_samples:,} ({remainder} an epoch)"),
            ("validation samples", f"{self.val_samples:,}"),
            ("classes", f"{self.num_classes:,}"),
            ("steps per epoch", f"{self.steps_per_epoch:,}"),
            ("total steps", f"{self.total_steps:,} ({self.total_steps / self.steps_per_epoch:.4g} epochs)"),
            ("learning rate at start, peak, end", f"{self.lr_start:.4g}, {self.lr_peak:.4g}, {self.lr_end:.4g}"),
            ("warm-up", f"{self.schedule.warmup_steps:,} steps, then {self.schedule.kind}"),
            ("checkpoints", self._checkpoints()),
        ]

    def _checkpoints(self) -> str:
        if self.checkpoint_mtbf_hours is not None:
            return f"as often as pays with a failure every {self.checkpoint_mtbf_hours:g} hours"
        every = self.checkpoint_every_steps
        return f"every {every:,} steps" if every else "at the end of each epoch"


def make_plan(
    config: Config, *, world_size: int, num_nodes: int, train_samples: int, val_samples: int, num_classes: int
) -> Plan:
    """The plan of ``config`` on ``world_size`` ranks, for a data set with these counts.

    Raises UserError, with one line for each thing that cannot work.
    """
    batch_global = config.train.batch_per_worker * world_size * config.train.accumulation
    faults = [
        *_worker_faults(config, world_size),
        *_grid_faults(config.gradients, world_size),
        *_batch_faults(config, world_size, train_samples),
        *_data_faults(config, val_samples, num_classes),
    ]
    if faults:
        raise UserError("\n".join(faults))
    steps_per_epoch = count_steps(train_samples, batch_global, pad=config.train.last_batch == "pad")
    scheduled_steps = config.train.epochs * steps_per_epoch
    return Plan(
        world_size=world_size,
        nodes=num_nodes,
        workers=world_size,
        batch_per_worker=config.train.batch_per_worker,
        accumulation=config.train.accumulation,
        batch_global=batch_global,
        train_samples=train_samples,
        val_samples=val_samples,
        num_classes=config.data.num_classes or num_classes,
        steps_per_epoch=steps_per_epoch,
        epochs=config.train.epochs,
        total_steps=min(scheduled_steps, config.train.max_steps or scheduled_steps),
        last_batch=config.train.last_batch,
        checkpoint_every_steps=config.checkpoint.every_steps,
        checkpoint_mtbf_hours=config.checkpoint.mtbf_hours,
        schedule=_schedule(config, batch_global, steps_per_epoch, scheduled_steps),
    )


def count_steps(samples: int, batch_global: int, *, pad: bool) -> int:
    """Steps over ``samples``, the last partial global batch left out or (``pad``) filled up."""
    return -(-samples // batch_global) if pad else samples // batch_global


def _schedule(config: Config, batch_global: int, steps_per_epoch: int, scheduled_steps: int) -> Schedule:
    """Epochs become steps here. train.max_steps ends a run early without bending its schedule."""
    asked = config.schedule
    factor = batch_global / asked.reference_batch if asked.reference_batch else 1.0
    return Schedule(
        kind=asked.kind,
        peak=asked.lr * factor,
        start=asked.warmup_start,
        final=asked.final_lr * factor,
        warmup_steps=round(asked.warmup_epochs * steps_per_epoch),
        total_steps=scheduled_steps,
        milestones=tuple(round(epoch * steps_per_epoch) for epoch in asked.milestones),
        gamma=asked.gamma,
        power=asked.power,
    )


def _worker_faults(config: Config, world_size: int) -> Iterator[str]:
    virtual = config.parallel.virtual_workers
    if virtual is not None and virtual != world_size:
        yield (
            f"parallel.virtual_workers is {virtual}, but this job has {world_size} ranks and a worker takes a rank of "
            f"its own: start {virtual} ranks, or leave the key out and set train.accumulation for a larger batch."
        )


def _grid_faults(gradients: GradientsConfig, world_size: int) -> Iterator[str]:
    if gradients.grid is None:
        return
    if gradients.reduction != "grid":
        yield (
            f"gradients.grid is for gradients.reduction=grid, but that is {gradients.reduction}: "
            "set it to grid, or leave gradients.grid out."
        )
    elif math.prod(gradients.grid) != world_size:
        length, rows = gradients.grid
        yield (
            f"A grid of {rows} rows of {length} does not cover {world_size} ranks: "
            f"set gradients.grid to two numbers whose product is {world_size}, or leave it out."
        )


def _batch_faults(config: Config, workers: int, train_samples: int) -> Iterator[str]:
    batch, accumulation = config.train.batch_per_worker, config.train.accumulation
    if batch * workers * accumulation > train_samples:
        yield (
            f"The global batch is {batch * workers * accumulation:,} (train.batch_per_worker {batch:,} x {workers:,} "
            f"workers x train.accumulation {accumulation:,}), but the training set has {train_samples:,} samples: "
            "lower train.batch_per_worker or train.accumulation, or start fewer ranks."
        )


def _data_faults(config: Config, val_samples: int, num_classes: int) -> Iterator[str]:
    if val_samples < 1 and config.train.eval_every_epochs is not None:
        yield (
            "The data set has no validation samples: give it a folder `val`, set data.val_fraction (0.1, say), "
            "or train.eval_every_epochs=none."
        )
    if num_classes < 2:
        yield f"The data set has {num_classes} class, but a classifier needs at least 2: add a folder for each class."
    elif config.data.num_classes is not None and config.data.num_classes < num_classes:
        yield (
            f"data.num_classes is {config.data.num_classes}, but the data set has {num_classes} classes: "
            f"set it to {num_classes}, or leave it out."
        )
