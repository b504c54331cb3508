"""The section `launch`: how a run ends before its time, and what its batch job is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Strict

from hpctrain.config.section import Count, NonNegativeFloat, Section

SignalName = Literal["USR1", "USR2", "TERM"]


class LaunchConfig(Section):
    """Preemption, time limits and requeues."""

    signals: Annotated[tuple[SignalName, ...], Strict(False)] = ("USR1", "USR2", "TERM")
    """signals that ask for a checkpoint and an end with exit status 75; USR1 and USR2 left out are ignored, TERM left
    out ends a rank at once"""
    max_requeues: Count = 10
    """how often a batch job may requeue itself"""
    slow_node: Literal["warn", "stop"] = "warn"
    """what a slow node found before the first step leads to: a warning, or the end of the job"""
    margin_s: NonNegativeFloat = 60.0
    """how long before the job's time limit its last checkpoint must be written"""

    def conflicts(self) -> Iterator[str]:
        for name, count in Counter(self.signals).items():
            if count > 1:
                yield f"signals names {name} {count} times: name it once"
