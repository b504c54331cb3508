"""Decisions of the whole group: act once and tell all, or fail on all ranks with one message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpctrain.comm.base import Communicator
from hpctrain.errors import HpctrainError, MachineError, UserError

_KINDS: dict[str, type[HpctrainError]] = {"UserError": UserError, "MachineError": MachineError}


def _describe(error: HpctrainError) -> dict[str, str]:
    kind = next((name for name, cls in _KINDS.items() if isinstance(error, cls)), "MachineError")
    return {"kind": kind, "message": str(error)}


def on_rank_zero(comm: Communicator, action: Callable[[], Any]) -> Any:
    """Run ``action`` on rank 0 and return its value (JSON) on every rank.

    When it raises UserError or MachineError there, every rank raises that error.
    """
    outcome: dict[str, Any] = {}
    if comm.rank == 0:
        try:
            outcome = {"value": action()}
        except HpctrainError as error:
            outcome = {"error": _describe(error)}
    outcome = comm.broadcast_object(outcome)
    if "error" in outcome:
        raise _KINDS[outcome["error"]["kind"]](outcome["error"]["message"])
    return outcome["value"]


def raise_together(comm: Communicator, error: HpctrainError | None) -> None:
    """Return when no rank has an error; else raise, on every rank, the one of the lowest rank that has."""
    errors = comm.all_gather_object(_describe(error) if error else None)
    first = next(((rank, found) for rank, found in enumerate(errors) if found), None)
    if first is None:
        return
    rank, found = first
    suffix = f" (rank {rank})" if comm.world_size > 1 and rank > 0 else ""
    raise _KINDS[found["kind"]](found["message"] + suffix)
