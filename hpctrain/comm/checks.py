"""What every engine checks and translates in the same way: dtypes, sizes, the world, and failures."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import Topology


def as_bytes(buffer: Tensor) -> Tensor:
    """``buffer`` [n] of any dtype as uint8 [n * itemsize], over the same memory: what engines move."""
    return buffer.view(torch.uint8)


def require_reducible(engine: str, buffer: Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Raise UserError unless the engine can reduce buffers of this dtype."""
    if buffer.dtype not in dtypes:
        able = ", ".join(sorted(_plain(dtype) for dtype in dtypes))
        raise UserError(
            f"the {engine} engine cannot reduce {_plain(buffer.dtype)}: use one of {able}, or another comm.engine"
        )


def require_parts(whole: Tensor, part: Tensor, num_parts: int) -> None:
    """Raise ValueError unless ``whole`` is as long as ``num_parts`` times ``part`` and of its dtype."""
    if whole.dtype != part.dtype or whole.numel() != num_parts * part.numel():
        raise ValueError(
            f"{num_parts} parts of {part.numel()} {_plain(part.dtype)} do not make "
            f"{whole.numel()} {_plain(whole.dtype)}"
        )


def require_output(output: Tensor | None, buffer: Tensor, num_parts: int) -> Tensor:
    """A gathering root's ``output``; ValueError unless it is there and holds ``num_parts`` times ``buffer``."""
    if output is None:
        raise ValueError("the root of a gather needs an output")
    require_parts(output, buffer, num_parts)
    return output


def require_ascending(ranks: Sequence[int]) -> None:
    """Raise ValueError unless ``ranks`` is not empty and strictly ascending: engines order groups that way."""
    if not ranks or any(low >= high for low, high in pairwise(ranks)):
        raise ValueError(f"a group's ranks must be ascending and each but once, not {list(ranks)}")


def require_same_world(topology: Topology, engine: str, rank: int, world_size: int, remedy: str) -> None:
    """Raise UserError when the engine came up with another rank or world size than the launcher told."""
    if (rank, world_size) != (topology.rank, topology.world_size):
        raise UserError(
            f"{topology.launcher} says rank {topology.rank} of {topology.world_size} but the {engine} engine came up "
            f"as rank {rank} of {world_size}: {remedy}"
        )


@contextmanager
def faults(topology: Topology, engine: str, operation: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the engine's own exceptions into MachineError with the place of this rank."""
    try:
        yield
    except kinds as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise MachineError(
            f"{engine} {operation} failed on rank {topology.rank} (host {topology.host}): {first_line}"
        ) from error


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
