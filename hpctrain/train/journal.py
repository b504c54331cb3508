"""What a run tells while it goes on: the log files, TensorBoard and the display, from figures of all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from hpctrain.errors import UserError
from hpctrain.gradients.tally import ROUNDING
from hpctrain.launch.continuing import in_run_dir
from hpctrain.metrics.progress import Display
from hpctrain.metrics.steplog import EvalFigures, StepFigures
from hpctrain.metrics.stragglers import MIN_STEPS, StragglerWatch
from hpctrain.metrics.system import SystemUse
from hpctrain.topology.phases import OWN_PHASES
from hpctrain.train.build import Feeds
from hpctrain.train.parts import Parts
from hpctrain.train.state import Evaluation, Progress


class Sink(Protocol):
    """Takes figures: a log file, TensorBoard."""

    def step(self, figures: StepFigures) -> None: ...

    def evaluation(self, figures: EvalFigures) -> None: ...

    def close(self) -> None: ...


class _Sums(NamedTuple):
    """What all ranks together have to tell of the steps since the last logged one.

    ``seconds`` [ranks, phases] float64 are medians of each rank's own phases.
    """

    loss: float
    corrupt_anywhere: bool
    wire: dict[str, int]
    seconds: np.ndarray


class Journal:
    """Gathers losses between logged steps; ``log``, ``evaluation`` and the making of one are collective.

    ``sinks`` are empty on all ranks but the first. ``run_dir`` is named where the run diverges.
    """

    def __init__(self, parts: Parts, feeds: Feeds, display: Display, sinks: Sequence[Sink], run_dir: Path) -> None:
        self.display = display
        self.system = SystemUse(parts.comm.device)
        self._parts = parts
        self._feeds = feeds
        self._sinks = sinks
        self._run_dir = run_dir
        self._loss = torch.zeros((), dtype=torch.float64, device=parts.comm.device)
        self._steps = 0
        self._stragglers = StragglerWatch(parts.comm.all_gather_object(parts.comm.topology.host))
        # Each step is judged once: of one burst of foreign work, windows that overlap would make several findings.
        self._unjudged = 0

    def add(self, loss: Tensor) -> None:
        """Take this rank's mean loss of one step; nothing waits for the device."""
        self._loss += loss
        self._steps += 1

    def log(self, progress: Progress) -> None:
        """Tell of the steps since the last call.

        Raises UserError when their loss is not finite, or when too many samples cannot be decoded.
        """
        parts, steps = self._parts, self._steps
        if steps == 0:
            return
        interval = parts.clock.interval()
        self._unjudged += interval.steps
        judged = interval if interval.steps == self._unjudged else parts.clock.recent(self._unjudged)
        loss, corrupt_anywhere, wire, seconds = self._reduce(progress, judged.phases_s)
        for name, count in wire.items():
            progress.wire[name] += count
        if corrupt_anywhere:
            self._take_corrupt(progress)
        if judged.steps >= MIN_STEPS:
            self._judge(seconds, progress.step)
        progress.train_s += interval.seconds
        figures = StepFigures(
            step=progress.step,
            epoch=self._epochs(progress),
            loss=loss,
            lr=parts.plan.schedule.lr_at(progress.step - 1),
            images_per_s=interval.images_per_s(parts.plan.batch_global),
            phases_s=interval.phases_s,
            counters={
                "samples_seen": progress.samples_seen,
                "corrupt_skipped": len(progress.corrupt),
                **({"loss_scale": parts.loss_scale.value} if parts.loss_scale else {}),
                **(wire if parts.config.gradients.compression != "none" else {}),
                **self.system.sample(progress.step),
            },
            stragglers=self._stragglers.slow,
        )
        for sink in (*self._sinks, self.display):
            sink.step(figures)
        if not math.isfinite(loss):
            raise not_finite("loss", progress.step - steps + 1, progress.step, figures.lr, self._run_dir)

    def evaluation(self, progress: Progress, result: Evaluation, seconds: float) -> None:
        """Tell of an evaluation that took ``seconds``; raises UserError when too many samples cannot be decoded."""
        self._take_corrupt(progress)
        figures = EvalFigures(
            step=progress.step,
            epoch=self._epochs(progress),
            loss=result.loss,
            top1=result.top1,
            top5=result.top5,
            seen=result.seen,
            seconds=seconds,
        )
        for sink in (*self._sinks, self.display):
            sink.evaluation(figures)

    def close(self) -> None:
        """Close files and leave the terminal as it was."""
        for sink in (*self._sinks, self.display):
            sink.close()

    def _epochs(self, progress: Progress) -> float:
        """Epochs done, with their fraction in steps: a whole number where an epoch ends, samples dropped or not."""
        plan = self._parts.plan
        return progress.epoch + progress.position / (plan.steps_per_epoch * plan.batch_global)

    def _reduce(self, progress: Progress, phases_s: Mapping[str, float]) -> _Sums:
        """Sum over all ranks, in one collective: the mean loss a step, whether any has found a corrupt sample not known
        yet, the wire's tally, and each rank's ``phases_s``, which it adds to zeros of the others.
        """
        tally, comm = self._parts.exchange.tally, self._parts.comm
        rows = torch.zeros(comm.world_size, len(OWN_PHASES), dtype=torch.float64)
        rows[comm.rank] = torch.tensor([phases_s[phase] for phase in OWN_PHASES])
        mine = torch.stack([self._loss, torch.full_like(self._loss, len(self._new_corrupt(progress)))])
        packed = torch.cat([mine, tally.rounding.double(), rows.flatten().to(comm.device)])
        comm.all_reduce_(packed).wait()
        sums = packed.cpu()
        loss_sum, corrupt, *rounding = sums[: -rows.numel()].tolist()
        wire = {**dict(zip(ROUNDING, map(int, rounding), strict=True)), "skipped_steps": tally.skipped}
        seconds = sums[-rows.numel() :].view_as(rows).numpy()
        found = _Sums(loss_sum / self._steps / comm.world_size, corrupt > 0, wire, seconds)
        self._loss.zero_()
        tally.clear()
        self._steps = 0
        return found

    def _judge(self, seconds: np.ndarray, last_step: int) -> None:
        """Compare the ranks' ``seconds`` of the steps not judged yet, and tell who has become slow or has caught up."""
        first_step, self._unjudged = last_step - self._unjudged + 1, 0
        for sentence in self._stragglers.judge(seconds, first_step, last_step):
            self.display.message(sentence)

    def _new_corrupt(self, progress: Progress) -> list[str]:
        known = set(progress.corrupt)
        return [line for line in self._feeds.corrupt if line not in known]

    def _take_corrupt(self, progress: Progress) -> None:
        """Count and show each corrupt sample once, however many ranks have met it. Collective.

        A rank's loader stops the job by what it has met itself; of many ranks each meets few.
        """
        gathered = self._parts.comm.all_gather_object(self._new_corrupt(progress))
        for line in dict.fromkeys(line for lines in gathered for line in lines):
            progress.corrupt.append(line)
            self.display.message(line)
        plan, data = self._parts.plan, self._parts.config.data
        count, samples = len(progress.corrupt), plan.train_samples + plan.val_samples
        if count > data.max_corrupt_share * samples:
            raise UserError(
                f"{count} of {samples} samples ({count / samples:.2%}) cannot be decoded, more than "
                f"data.max_corrupt_share = {data.max_corrupt_share:.2%} allows, the last one being "
                f"{progress.corrupt[-1]}: run `hpctrain data verify {data.path}` to list them all"
            )


def not_finite(what: str, first_step: int, last_step: int, lr: float, run_dir: Path) -> UserError:
    """The error of the run in ``run_dir`` that diverged within the steps named (counted from 1)."""
    when = f"in step {last_step}" if first_step == last_step else f"between steps {first_step} and {last_step}"
    return UserError(
        f"the {what} became NaN or infinite {when} (learning rate {lr:.4g}); "
        "lower schedule.lr or lengthen schedule.warmup_epochs, and continue from the last checkpoint with "
        f"{in_run_dir(run_dir)}"
    )
