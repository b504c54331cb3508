"""The section `checkpoint`: what is kept, and how often."""

from __future__ import annotations

from collections.abc import Iterator

from hpctrain.config.section import Positive, PositiveFloat, Section


class CheckpointConfig(Section):
    """What is kept, and how often."""

    every_steps: Positive | None = None
    """optimizer steps between checkpoints; none saves at the end of each epoch"""
    mtbf_hours: PositiveFloat | None = None
    """mean time between failures of the whole job: checkpoints then follow each other as their measured cost C asks
    for, every sqrt(2 C MTBF) (Young 1974, doi 10.1145/361147.361115; Daly 2006, doi 10.1016/j.future.2004.11.016)"""
    keep: Positive = 3
    """newest checkpoints kept"""

    def conflicts(self) -> Iterator[str]:
        if self.every_steps is not None and self.mtbf_hours is not None:
            yield (
                f"every_steps is {self.every_steps} and mtbf_hours is {self.mtbf_hours:g}, but only one can set the "
                "interval: leave the other out"
            )
