"""What an exchange tells of itself: figures of one step, and what the wire did to gradients between logged steps.

Who sums the latter over ranks is the journal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hpctrain.gradients.verdict import Verdict

#: what ``Tally.rounding`` holds
ROUNDING = ("overflow", "underflow", "subnormal", "nonfinite")


@dataclass(slots=True)
class Tally:
    """What went wrong on the wire since it was last taken.

    ``rounding`` int64 [4] are this rank's elements in the steps that were counted (see ``Kernels.count``);
    ``skipped`` steps had a mean that was not finite, on all ranks alike.
    """

    rounding: Tensor
    skipped: int = 0

    def clear(self) -> None:
        self.rounding.zero_()
        self.skipped = 0


@dataclass(frozen=True, slots=True)
class ExchangeStats:
    """One exchange, as this rank saw it.

    ``buffer_bytes`` is what the engine was handed; ``early`` of ``buckets`` were launched during the backward
    pass; ``missing`` parameters had no gradient here and sent zeros. ``exposed_s`` is the host's time in
    ``finish``: on a GPU, where waiting only orders streams, measure with events around ``finish`` instead.
    ``verdict`` is that of all ranks, None where nobody asked for one.
    """

    buckets: int
    early: int
    missing: int
    buffer_bytes: int
    exposed_s: float
    verdict: Verdict | None
