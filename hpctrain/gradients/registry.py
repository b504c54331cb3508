"""The reductions and wires there are, by the names a configuration uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch

from hpctrain.errors import UserError
from hpctrain.gradients.central import CentralReduction
from hpctrain.gradients.grid import GridReduction
from hpctrain.gradients.ordered import OrderedReduction
from hpctrain.gradients.reduction import EngineReduction, Reduction
from hpctrain.gradients.wire import FeedbackWire, NarrowWire, PlainWire, Wire

REDUCTIONS: dict[str, type[Reduction]] = {
    "engine": EngineReduction,
    "ordered": OrderedReduction,
    "grid": GridReduction,
    "central": CentralReduction,
}
#: how gradients travel, and the type of the buffer; None: their own
WIRES: dict[str, tuple[type[Wire], torch.dtype | None]] = {
    "none": (PlainWire, None),
    "fp16": (NarrowWire, torch.float16),
    "bf16": (NarrowWire, torch.bfloat16),
    "fp16_ef": (FeedbackWire, torch.float16),
}

T = TypeVar("T")


def find(kind: str, table: Mapping[str, T], name: str) -> T:
    """The entry ``name`` of ``table``; raises UserError that lists what is known."""
    if name not in table:
        raise UserError(f"gradients.{kind}={name!r} is not known; choose one of: {', '.join(table)}")
    return table[name]
