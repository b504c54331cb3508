"""Learning rate as a pure function of the optimizer step.

Everything is in steps; who thinks in epochs converts first (``hpctrain.config.plan``). There is no state to
save or restore, so a resumed run has the rates of an uninterrupted one, bit for bit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

Kind = Literal["constant", "step", "cosine", "poly"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Linear warm-up from ``start`` to ``peak`` over ``warmup_steps``, then one of four courses.

    The warm-up adds the same amount each step (Goyal et al. 2017, section 2.2); its first step has ``start``,
    and step ``warmup_steps`` has ``peak``. After it:

    - ``constant``: ``peak``.
    - ``step``: ``peak`` times ``gamma`` for each of ``milestones`` reached (counted from step 0; Goyal et al., 5.1).
    - ``cosine``: half a cosine from ``peak`` to ``final`` (Loshchilov and Hutter 2017, equation 5).
    - ``poly``: ``peak`` to ``final`` along ``(1 - t) ** power`` (You et al. 2017, with power 2).

    ``cosine`` and ``poly`` reach ``final`` at ``total_steps``, one after the last step, as the papers have it:
    with ``final`` 0 the last step still moves.
    """

    kind: Kind
    peak: float
    total_steps: int
    warmup_steps: int = 0
    start: float = 0.0
    final: float = 0.0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    power: float = 2.0

    def lr_at(self, step: int) -> float:
        """The learning rate of optimizer step ``step`` (0 is the first; past the end the course holds)."""
        assert step >= 0, step
        if step < self.warmup_steps:
            return self.start + (self.peak - self.start) * (step / self.warmup_steps)
        if self.kind == "constant":
            return self.peak
        if self.kind == "step":
            return self.peak * self.gamma ** bisect_right(self.milestones, step)
        remaining = self.total_steps - self.warmup_steps
        progress = min(1.0, (step - self.warmup_steps) / remaining) if remaining > 0 else 0.0
        share = 0.5 * (1.0 + math.cos(math.pi * progress)) if self.kind == "cosine" else (1.0 - progress) ** self.power
        return self.final + (self.peak - self.final) * share
