"""The training loop: steps, and what happens between them. How the parts came to be is in ``build``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hpctrain.comm.turns import Turns
from hpctrain.config.plan import Plan
from hpctrain.config.schema import TrainConfig
from hpctrain.data.types import Batch
from hpctrain.gradients.replicas import average_buffers, check_replicas
from hpctrain.train.journal import Journal
from hpctrain.train.parts import Parts
from hpctrain.train.saver import Saver
from hpctrain.train.state import Evaluation, Progress
from hpctrain.train.step import train_step


@dataclass
class Loop:
    """A run under way. Every rank takes the same turns, since all they depend on is equal on all ranks."""

    parts: Parts
    progress: Progress
    batches: Iterator[Batch]
    evaluate: Callable[[], Evaluation]
    journal: Journal
    saver: Saver
    turns: Turns

    def train(self) -> str:
        """Train until there is a reason to stop, and return it.

        Raises Stopped, between two steps or within an evaluation, where the ranks were asked to end before that; the
        evaluation is done again by the launch that goes on.
        """
        parts, progress, saver = self.parts, self.progress, self.saver
        parts.clock.resume(max(0, progress.step - 1))
        while (reason := reason_to_stop(parts.plan, progress, parts.config.train)) is None:
            while self._steps_left():
                self.step()
                if saver.due(progress.step) and self._steps_left():
                    self.save()
            self._evaluate()
            if not parts.plan.steps_left_in_epoch(progress.position):
                progress.next_epoch()
            if saver.at_epochs_end or saver.due(progress.step):
                self.save()
        return reason

    def _steps_left(self) -> int:
        """Steps to the end of the epoch or of the run, whichever comes first."""
        plan, progress = self.parts.plan, self.progress
        # The checkpoint may be of a later step than this launch's limit.
        return max(0, min(plan.steps_left_in_epoch(progress.position), plan.total_steps - progress.step))

    def step(self) -> None:
        """One optimizer step, and what belongs to it: the clock, the log and the comparison of replicas when due."""
        self.turns.begin()
        parts, progress = self.parts, self.progress
        parts.clock.step(progress.step)
        loss = train_step(parts, self.batches, progress.step)
        left = parts.plan.train_samples - progress.position
        progress.advance(parts.plan.batch_global, min(left, parts.plan.batch_global))
        parts.clock.end_step()
        self.journal.add(loss)
        if self._due(parts.config.log.every_steps):
            self.journal.log(progress)
        if self._due(parts.config.gradients.check_every_steps):
            check_replicas(parts.comm, parts.model.named_parameters())

    def _due(self, every: int) -> bool:
        return self.progress.step % every == 0

    def _evaluate(self) -> None:
        """Judge the model where it is due."""
        progress = self.progress
        self.journal.log(progress)
        progress.owes_evaluation = self._evaluation_due()
        if not progress.owes_evaluation:
            return
        self.parts.clock.enter("eval")
        average_buffers(self.parts.comm, self.parts.model)
        started = time.perf_counter()
        result = self.evaluate()
        self.journal.evaluation(progress, result, time.perf_counter() - started)
        progress.take(result, self.parts.config.train.early_stopping)

    def _evaluation_due(self) -> bool:
        """Whether ``train.eval_every_epochs`` asks for an evaluation here; it does at the end of the run too."""
        plan, progress, every = self.parts.plan, self.progress, self.parts.config.train.eval_every_epochs
        if every is None or plan.val_samples == 0:
            return False
        return progress.step >= plan.total_steps or (progress.epoch + 1) % every == 0

    def save(self) -> None:
        """Save this step, once. Collective."""
        if self.saver.saved_step != self.progress.step:
            self.journal.log(self.progress)
            self.parts.clock.enter("checkpoint")
            self.saver.save(self.progress)


def reason_to_stop(plan: Plan, progress: Progress, train: TrainConfig) -> str | None:
    """What ends the run where ``progress`` stands, or None; equal on all ranks, since steps and evaluations are."""
    if progress.step >= plan.total_steps and not progress.owes_evaluation:
        return "finished"
    if progress.target_reached(train.target_accuracy):
        return f"target accuracy {train.target_accuracy} reached"
    stopping = train.early_stopping
    if stopping is not None and progress.evaluations_without_gain >= stopping.patience:
        return f"no gain in {stopping.monitor} over {stopping.patience} evaluations"
    return None
