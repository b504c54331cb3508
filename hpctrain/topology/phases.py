"""The phases of a rank's program, named once: for the clock, the watch, and what is told of either."""

from __future__ import annotations

from typing import Literal, get_args

Phase = Literal["start", "data", "forward", "backward", "exchange", "optimizer", "eval", "checkpoint", "end"]

#: in the order in which a program goes through them
PHASES: tuple[Phase, ...] = get_args(Phase)
#: those of an optimizer step
STEP_PHASES: tuple[Phase, ...] = ("data", "forward", "backward", "exchange", "optimizer")
#: those between two steps
OUTSIDE: tuple[Phase, ...] = ("eval", "checkpoint")
#: what a rank does by itself in a step: in the exchange it waits for the others
OWN_PHASES: tuple[Phase, ...] = tuple(phase for phase in STEP_PHASES if phase != "exchange")
