"""The reductions and wires there are, by the names a configuration uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from hpctrain.errors import UserError
from hpctrain.gradients.ordered import OrderedReduction
from hpctrain.gradients.reduction import EngineReduction, Reduction
from hpctrain.gradients.wire import PlainWire, Wire

REDUCTIONS: dict[str, type[Reduction]] = {"engine": EngineReduction, "ordered": OrderedReduction}
WIRES: dict[str, type[Wire]] = {"none": PlainWire}

T = TypeVar("T")


def find(kind: str, table: Mapping[str, T], name: str) -> T:
    """The entry ``name`` of ``table``; raises UserError that lists what is known."""
    if name not in table:
        raise UserError(f"gradients.{kind}={name!r} is not known; choose one of: {', '.join(table)}")
    return table[name]
