"""Saving a run: when, by all ranks alike, and so that training stands still for the copy and not for the write."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hpctrain.comm.agree import on_rank_zero
from hpctrain.gradients.replicas import average_buffers, check_replicas
from hpctrain.train.checkpoint import TensorGroups
from hpctrain.train.interval import interval_steps
from hpctrain.train.journal import not_finite
from hpctrain.train.parts import Parts
from hpctrain.train.resume import capture
from hpctrain.train.samples import SampleLog
from hpctrain.train.state import Progress
from hpctrain.train.writer import CheckpointWriter

#: between two signs of life while a write is waited for
_LOOK_S = 0.5
_PATIENCE_S = 10.0


class Saver:
    """Checkpoints of one run below ``folder``.

    ``saved_step`` is the step of the newest one, in the beginning of the one that the run goes on from.
    ``samples`` is there where samples are logged. At most one checkpoint is being written; the next waits for it.
    """

    def __init__(self, parts: Parts, folder: Path, saved_step: int, samples: SampleLog | None = None) -> None:
        self.saved_step = saved_step
        self._parts, self._folder, self._samples = parts, folder, samples
        self._writer = CheckpointWriter(folder, parts.config.checkpoint.keep)
        self._exposed_s: list[float] = []
        self._saved_at_s: list[float] = [time.monotonic()]
        # The first, from which the interval follows, is for measuring its cost.
        self._next_step = saved_step + parts.config.log.every_steps

    def due(self, step: int) -> bool:
        """Whether the interval asks for a checkpoint after ``step``."""
        config = self._parts.config.checkpoint
        if config.mtbf_hours is not None:
            return step >= self._next_step
        return config.every_steps is not None and step % config.every_steps == 0

    @property
    def at_epochs_end(self) -> bool:
        """Whether each epoch's end asks for one: no interval does."""
        config = self._parts.config.checkpoint
        return config.every_steps is None and config.mtbf_hours is None

    def save(self, progress: Progress) -> None:
        """Take a checkpoint of this step. Collective; nothing that is not finite is ever saved.

        It is copied on return and written soon. Raises MachineError when the one before could not be written.
        """
        parts, started_s = self._parts, time.monotonic()
        if self._samples is not None:
            self._samples.flush()  # on all ranks before rank 0 can write: the comparison makes it wait for them
        parts.comm.arrive()
        check_replicas(parts.comm, parts.model.named_parameters())
        average_buffers(parts.comm, parts.model)
        checkpoint = capture(parts, progress)
        if not all_finite(checkpoint.tensors):
            first_step, lr = self.saved_step + 1, parts.plan.schedule.lr_at(progress.step - 1)
            raise not_finite("model or the optimizer's state", first_step, progress.step, lr, self._folder.parent)
        self.wait()
        if parts.comm.rank == 0:
            self._writer.start(checkpoint)
        self._exposed_s.append(time.monotonic() - started_s)
        self._set_next(progress.step)
        self.saved_step = progress.step

    def wait(self) -> None:
        """Return when nothing is being written any more. Collective; raises MachineError when a write failed.

        However long it takes: the ranks show signs of life meanwhile.
        """
        while not on_rank_zero(self._parts.comm, lambda: self._writer.finished(_LOOK_S)):
            self._parts.clock.enter("checkpoint")

    def close(self) -> bool:
        """End with the run: after an error too, a sound checkpoint is given the time to be written.

        Whether nothing is being written any more.
        """
        idle = self._writer.idle(_PATIENCE_S)
        if self._samples is not None:
            self._samples.close()
        return idle

    @property
    def writes_s(self) -> Sequence[float]:
        """How long each write of this launch that is over took, in seconds, on rank 0."""
        return self._writer.write_s

    def to_record(self) -> dict[str, Any]:
        """What checkpoints cost in this launch: medians of the time between two, from copy to rename, and for which
        training stood still. None without one."""
        spans = [later - earlier for earlier, later in zip(self._saved_at_s[1:], self._saved_at_s[2:], strict=False)]
        return {
            "every_s": statistics.median(spans) if spans else None,
            "write_s": statistics.median(self.writes_s) if self.writes_s else None,
            "exposed_s": statistics.median(self._exposed_s) if self._exposed_s else None,
        }

    def _set_next(self, step: int) -> None:
        """Where ``checkpoint.mtbf_hours`` is set, agree on the step of the next checkpoint."""
        now_s = time.monotonic()
        step_s = (now_s - self._saved_at_s[-1]) / max(1, step - self.saved_step)
        self._saved_at_s.append(now_s)
        hours = self._parts.config.checkpoint.mtbf_hours
        if hours is not None:
            cost_s = statistics.median(self._exposed_s)
            steps = interval_steps(cost_s, max(self.writes_s, default=0.0), 3600 * hours, step_s)
            self._next_step = step + on_rank_zero(self._parts.comm, lambda: steps)


@torch.no_grad()
def all_finite(groups: TensorGroups) -> bool:
    """Whether every number of a checkpoint's tensors is finite."""
    sums = [tensor.sum() for tensors in groups.values() for tensor in tensors.values() if tensor.is_floating_point()]
    # An optimizer may count its steps on the host.
    return bool(torch.stack([total.to(sums[0].device) for total in sums]).isfinite().all())
