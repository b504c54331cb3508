"""Where a run stands: the counters that, with the tensors, are all a checkpoint has to hold."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


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
    corrupt_skipped: int = 0
    train_s: float = 0.0
    best_monitored: float | None = None
    evaluations_without_gain: int = 0
    last_evaluation: dict[str, Any] | None = None
    loss_scale: dict[str, float] = field(default_factory=dict)

    def advance(self, samples: int, counted: int) -> None:
        """One optimizer step over ``samples`` positions, ``counted`` of them not padding."""
        self.step += 1
        self.position += samples
        self.samples_seen += counted

    def next_epoch(self) -> None:
        """Go to the start of the following epoch."""
        self.epoch += 1
        self.position = 0

    def to_numbers(self) -> dict[str, Any]:
        """The counters as JSON."""
        return asdict(self)

    @classmethod
    def from_numbers(cls, numbers: dict[str, Any]) -> Progress:
        """The counters of a checkpoint."""
        return cls(**numbers)
