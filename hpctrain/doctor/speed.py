"""How fast each node computes, and exchanges within itself and with others: a few tenths of a second each.

It measures and checks results; who is slow is for ``suspects`` to say.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator
from hpctrain.metrics.clock import synchronise

#: Side of the matrices, and bytes of a sum: some milliseconds each, far above the latency of a launch or message.
_SIDE = {"cpu": 512, "cuda": 8192}
_SUM_BYTES = 4 << 20
_PRODUCTS_S = 0.4
_SUMS, _WARMUP = 7, 2
#: after which a slow network is known well enough: no further sums, once there is one to count
_SUMS_S = 1.0


@dataclass(frozen=True, slots=True)
class Sum:
    """An all-reduce over all ranks of ``hosts``: median seconds, and whether it came out each time."""

    hosts: tuple[str, ...]
    seconds: float
    right: bool


@dataclass(frozen=True, slots=True)
class Pace:
    """One rank's figures: median seconds of a matrix product, and the sums that it took part in.

    ``checksum`` is of the product's elements, equal on all ranks that compute alike.
    """

    product_s: float
    checksum: float
    sums: tuple[Sum, ...]


def measure(comm: Communicator, hosts: Sequence[str], ring: Sequence[str]) -> Pace:
    """This rank's figures; ``hosts`` by rank, ``ring`` each once, neighbours to be measured together. Collective.

    Raises UserError where the engine makes no groups of ranks.
    """
    product_s, checksum = time_product(comm.device)
    sums = []
    for together in groups(ring):
        # All groups of a round are made by all ranks, and then used at once.
        members = [(names, comm.subgroup(_ranks_on(names, hosts))) for names in together]
        comm.barrier()
        for names, group in members:
            if group is not None and group.world_size > 1:
                sums.append(Sum(names, *time_sum(group)))
    return Pace(product_s, checksum, tuple(sums))


def groups(names: Sequence[str]) -> list[list[tuple[str, ...]]]:
    """Rounds of hosts that sum together: each alone, then each with both of its neighbours in a ring, in turn."""
    ring = list(pairwise([*names, names[0]] if len(names) > 2 else names))
    # In an odd ring the last pair has a node in common with pairs of both rounds.
    paired = ring[: len(ring) - len(ring) % 2] if len(names) > 2 else ring
    alone: list[tuple[str, ...]] = [(name,) for name in names]
    rounds: list[list[tuple[str, ...]]] = [alone, [*paired[::2]], [*paired[1::2]], [*ring[len(paired) :]]]
    return [some for some in rounds if some]


def time_product(device: torch.device) -> tuple[float, float]:
    """Median seconds of a matrix product, and the sum of the magnitudes of its elements.

    The matrices hold +1 and -1, drawn alike everywhere: partial sums are whole numbers, exact in any order.
    """
    side = _SIDE[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(1)
    matrix = (torch.randint(0, 2, (side, side), generator=generator) * 2 - 1).to(device, dtype)
    output = torch.empty_like(matrix)
    multiply(matrix, output)
    synchronise(device)
    times = list(_timed(lambda: multiply(matrix, output), device, _PRODUCTS_S))
    return statistics.median(times), float(output.double().abs().sum())


def multiply(matrix: Tensor, output: Tensor) -> None:
    """The product that is timed."""
    torch.mm(matrix, matrix, out=output)


def time_sum(group: Communicator) -> tuple[float, bool]:
    """Median seconds of an all-reduce over ``group``, and whether each came out. Collective over the group.

    The last element counts the ranks to which it takes too long, so that all end after the same sum.
    """
    expected = group.world_size * (group.world_size + 1) / 2
    times: list[float] = []
    right, enough = True, False
    while len(times) < _SUMS and not enough:
        buffer = torch.full((_SUM_BYTES // 4,), float(group.rank + 1), device=group.device)
        buffer[-1] = len(times) >= _WARMUP and sum(times) > _SUMS_S
        group.barrier()
        synchronise(group.device)
        started = time.perf_counter()
        group.all_reduce_(buffer).wait()
        synchronise(group.device)
        times.append(time.perf_counter() - started)
        right = right and bool((buffer[:-1] == expected).all())
        enough = bool(buffer[-1] > 0)
    return statistics.median(times[_WARMUP:]), right


def _ranks_on(names: Sequence[str], hosts: Sequence[str]) -> list[int]:
    return [rank for rank, host in enumerate(hosts) if host in names]


def _timed(action: Callable[[], None], device: torch.device, total_s: float) -> Iterator[float]:
    """Seconds of each call of ``action``, for about ``total_s`` in all, three at the least."""
    done, began = 0, time.perf_counter()
    while done < 3 or time.perf_counter() - began < total_s:
        started = time.perf_counter()
        action()
        synchronise(device)
        yield time.perf_counter() - started
        done += 1
