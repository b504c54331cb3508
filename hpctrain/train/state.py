"""Where a run stands: the counters that, with the tensors, are all a checkpoint has to hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from hpctrain.config.schema import EarlyStoppingConfig
from hpctrain.gradients.tally import ROUNDING


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Exact figures over a whole validation part; fractions, and the mean loss a sample."""

    top1: float
    top5: float
    loss: float
    seen: int


@dataclass(slots=True)
class Progress:
    """Counters of a run, equal on all ranks.

    ``step`` counts optimizer steps done; the loader stands at sample ``position`` of ``epoch``'s order.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    samples_seen: int = 0
    train_s: float = 0.0
    best_gain: float | None = None
    evaluations_without_gain: int = 0
    evaluation: dict[str, float] | None = None
    #: an evaluation has begun and was not finished
    owes_evaluation: bool = False
    #: elements that rounding to the wire's type spoilt in the steps that were counted, and steps left out
    wire: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*ROUNDING, "skipped_steps"), 0))
    #: a line for each sample that could not be decoded, on whichever rank, in the order they were found
    corrupt: list[str] = field(default_factory=list)

    def advance(self, samples: int, counted: int) -> None:
        """One optimizer step over ``samples`` positions, ``counted`` of them not padding."""
        self.step += 1
        self.position += samples
        self.samples_seen += counted

    def next_epoch(self) -> None:
        """Go to the start of the following epoch."""
        self.epoch += 1
        self.position = 0

    def take(self, result: Evaluation, stopping: EarlyStoppingConfig | None) -> None:
        """Note an evaluation, and how long the monitored figure has not improved."""
        self.evaluation = asdict(result)
        self.owes_evaluation = False
        if stopping is None:
            return
        gain = result.top1 if stopping.monitor == "val_top1" else -result.loss
        if self.best_gain is None or gain > self.best_gain + stopping.min_delta:
            self.best_gain, self.evaluations_without_gain = gain, 0
        else:
            self.evaluations_without_gain += 1

    def target_reached(self, target: float | None) -> bool:
        """Whether the last evaluation reached ``target`` top-1."""
        return target is not None and self.evaluation is not None and self.evaluation["top1"] >= target

    def to_numbers(self) -> dict[str, Any]:
        """The counters as JSON."""
        return asdict(self)

    @classmethod
    def from_numbers(cls, numbers: dict[str, Any]) -> Progress:
        """The counters of a checkpoint."""
        return cls(**numbers)
