"""What every reduction must give on every engine, checked against float64 on real ranks; run by contract.py.

Each check is a function ``check_*(comm)`` that raises AssertionError.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hpctrain.comm.base import Communicator
from hpctrain.errors import UserError
from hpctrain.gradients.central import CentralReduction
from hpctrain.gradients.grid import GridReduction
from hpctrain.gradients.ordered import OrderedReduction
from hpctrain.gradients.reduction import Reduction, complete
from hpctrain.gradients.registry import REDUCTIONS
from hpctrain.gradients.transport import Transport
from hpctrain.kernels.registry import kernels_for

#: The long one first: Horovod's Gloo sizes the send buffer of a socket by the first reduce-scatter, and after a short
#: one all that is long crawls.
LENGTHS = (16 * 1001, 16)
STEPS = 2


def gradients(comm: Communicator, rank: int, length: int, step: int) -> Tensor:
    """Of very different size, as gradients are, and different on each rank and in each step."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    exponents = torch.randint(-6, 6, (length,), generator=generator, device="cpu")
    drawn = torch.randn(length, generator=generator, device="cpu")
    return (drawn * torch.exp2(exponents)).to(comm.device)


def each_rank(comm: Communicator, length: int, step: int, dtype: torch.dtype) -> Tensor:
    return torch.stack([gradients(comm, rank, length, step).to(dtype) for rank in range(comm.world_size)])


def run(reductions: Sequence[Reduction], step: int) -> list[Tensor]:
    """The sums, of one step over several buffers."""
    comm = reductions[0].comm
    for reduction in reductions:
        reduction.begin()
        reduction.buffer.copy_(gradients(comm, comm.rank, reduction.buffer.numel(), step))
        reduction.start()
    complete(reductions)
    sums = []
    for reduction in reductions:
        reduction.wait()
        sums.append(torch.cat(list(reduction.parts)))
        reduction.end()
    return sums


def buffers(comm: Communicator, dtype: torch.dtype) -> list[Tensor]:
    return [torch.zeros(comm.world_size * length, dtype=dtype) for length in LENGTHS]


def close_to_float64(comm: Communicator, buffer: Tensor, step: int, roundings: int) -> None:
    """Each rounding errs by half a unit in the last place of what was added up so far."""
    rows = each_rank(comm, buffer.numel(), step, buffer.dtype).double()
    unit = torch.finfo(buffer.dtype).eps / 2
    error = (buffer.double() - rows.sum(0)).abs()
    assert bool((error <= 1.01 * roundings * unit * rows.abs().sum(0)).all()), float(error.max())


def same_on_all_ranks(comm: Communicator, buffer: Tensor) -> None:
    copies = buffer.new_zeros(comm.world_size * buffer.numel())
    comm.all_gather_(copies, buffer).wait()
    assert all(torch.equal(copy, buffer) for copy in copies.view(comm.world_size, -1).unbind())


def verify(comm: Communicator, reductions: Sequence[Reduction]) -> None:
    for step in range(STEPS):
        for total in run(reductions, step):
            close_to_float64(comm, total, step, comm.world_size)
            same_on_all_ranks(comm, total)
    for reduction in reductions:
        reduction.close()


def check_each_algorithm(comm: Communicator) -> None:
    kernels = kernels_for(comm.device)
    for dtype in (torch.float32, torch.float16):
        for name in (*REDUCTIONS, "auto"):
            transport = Transport(comm, name, dtype, kernels)
            made = [transport.allocate(comm.world_size * length, dtype) for length in LENGTHS]
            verify(comm, [transport.reduction_of(buffer) for buffer in made])


def check_a_grid_of_every_shape(comm: Communicator) -> None:
    world = comm.world_size
    for length in range(1, world + 1):
        if world % length:
            text = (
                f"a grid of {length} x 1 does not cover {world} ranks; set gradients.grid to two numbers whose product"
            )
            with pytest.raises(UserError, match=re.escape(text)):
                GridReduction(comm, torch.zeros(world), shape=(length, 1))
            continue
        shape = (length, world // length)
        for dtype in (torch.float32, torch.float16):
            verify(comm, [GridReduction(comm, buffer, shape=shape) for buffer in buffers(comm, dtype)])


def tree_of(comm: Communicator, length: int, step: int, dtype: torch.dtype) -> Tensor:
    """Neighbours first, in float32, rounded once: what ``ordered`` and ``central`` promise to the bit."""
    level = list(each_rank(comm, length, step, dtype).float().unbind())
    while len(level) > 1:
        pairs = [level[at : at + 2] for at in range(0, len(level), 2)]
        level = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    return level[0].to(dtype)


def check_ordered_and_central_give_the_same_bits_on_every_engine(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        transport = Transport(comm, "ordered", dtype, kernels_for(comm.device))
        shared = [transport.allocate(comm.world_size * length, dtype) for length in LENGTHS]
        for reductions in (
            [CentralReduction(comm, buffer) for buffer in buffers(comm, dtype)],
            [OrderedReduction(comm, buffer) for buffer in buffers(comm, dtype)],
            [OrderedReduction(comm, buffer, torch.empty_like(buffer)) for buffer in buffers(comm, dtype)],
            [transport.reduction_of(buffer) for buffer in shared],
        ):
            for step in range(STEPS):
                for total in run(reductions, step):
                    assert torch.equal(total, tree_of(comm, total.numel(), step, dtype)), (dtype, reductions[0])
            for reduction in reductions:
                reduction.close()


CHECKS = {name: check for name, check in list(globals().items()) if name.startswith("check_")}
