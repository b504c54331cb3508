"""Keeping the ranks' copies of a model equal: the first broadcast, averaged buffers, and the check that they are.

Everything travels in a few flat buffers. Nothing here belongs to a step's exchange of gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import Module

from hpctrain.comm.base import Communicator
from hpctrain.errors import MachineError
from hpctrain.gradients.ordered import OrderedReduction
from hpctrain.gradients.reduction import reduce_
from hpctrain.topology.voice import listed

#: Bounds the temporary memory of a broadcast.
_BROADCAST_BYTES = 64 << 20
#: Elements hashed at once: widened to 64 bits they still lie in a core's second-level cache.
_HASH_BLOCK = 1 << 18
#: Odd, so that multiplication by it loses nothing modulo 2**64 (Knuth, The Art of Computer Programming, 6.4).
_HASH_STEP = 6364136223846793005
#: Ranks that a message names on each side.
_NAMED_RANKS = 8

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def broadcast_state(comm: Communicator, model: Module) -> None:
    """Give every rank the parameters and buffers of rank 0, of whatever dtype. Collective.

    Values travel in the order of indices, so memory layouts may differ between ranks.
    """
    if comm.world_size == 1:
        return
    for group in _groups([*model.parameters(), *model.buffers()], _BROADCAST_BYTES):
        flat = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in group])
        comm.broadcast_(flat).wait()
        for tensor, part in zip(group, torch.split(flat, [tensor.nbytes for tensor in group]), strict=True):
            # A part of the byte buffer need not start where its dtype may be read from: the copy does.
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


@torch.no_grad()
def average_buffers(comm: Communicator, model: Module) -> None:
    """Replace floating-point buffers (running statistics) by their mean over ranks, the same bits on all.

    Counters keep their value: they are equal on ranks that have taken equal steps. Collective.
    """
    floating = [buffer for buffer in model.buffers() if buffer.is_floating_point() and buffer.numel()]
    if comm.world_size == 1:
        return
    for dtype in dict.fromkeys(buffer.dtype for buffer in floating):
        members = [buffer for buffer in floating if buffer.dtype == dtype]
        length = sum(buffer.numel() for buffer in members)
        flat = members[0].new_zeros(-(-length // comm.world_size) * comm.world_size)
        torch.cat([buffer.reshape(-1) for buffer in members], out=flat[:length])
        # Not the engine's own sum: evaluation and checkpoints then agree bit for bit between engines as well.
        reduce_(OrderedReduction(comm, flat))
        flat.mul_(1 / comm.world_size)
        parts = torch.split(flat[:length], [buffer.numel() for buffer in members])
        for buffer, part in zip(members, parts, strict=True):
            buffer.copy_(part.view(buffer.shape))


@torch.no_grad()
def check_replicas(comm: Communicator, named: Iterable[tuple[str, Tensor]]) -> None:
    """Compare hashes of the tensors over all ranks; call it with what must be equal, as parameters. Collective.

    Reads the tensors once on their device; 8 bytes a tensor travel. Raises MachineError, on every rank, that
    names the ranks outside the largest group of equal ones, their hosts and the first tensor that differs.
    """
    if comm.world_size == 1:
        return
    entries = list(named)
    mine = torch.stack([fingerprint(tensor) for _, tensor in entries])
    gathered = mine.new_empty(comm.world_size * mine.numel())
    comm.all_gather_(gathered, mine).wait()
    rows = [tuple(row) for row in gathered.view(comm.world_size, -1).tolist()]
    if len(set(rows)) == 1:
        return
    usual = Counter(rows).most_common(1)[0][0]
    astray = [rank for rank, row in enumerate(rows) if row != usual]
    first = next(index for index, value in enumerate(rows[astray[0]]) if value != usual[index])
    hosts = comm.all_gather_object(comm.topology.host)
    raise MachineError(
        f"the replicas have diverged: {_places(astray, hosts)} and "
        f"{_places([rank for rank, row in enumerate(rows) if row == usual], hosts)} "
        f"hold different values, first in {entries[first][0]!r}"
    )


def fingerprint(tensor: Tensor) -> Tensor:
    """A hash of the values as they lie in memory: int64 [], on the tensor's device.

    Modulo 2**64, each element times an odd weight of its position, so any single change and nearly every
    exchange of elements shows. Not a cryptographic hash.
    """
    bits = _memory_order(tensor.detach()).view(_INTEGERS[tensor.element_size()])
    weights = _weights(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for block in torch.split(bits, _HASH_BLOCK):
        total = total * _HASH_STEP + (block * weights[: block.numel()]).sum()
    return total


def _memory_order(tensor: Tensor) -> Tensor:
    """``tensor`` as [n] without a copy where it is dense in some order of its dimensions."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    return tensor.permute(order).reshape(-1)


@lru_cache(maxsize=2)
def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    bounds = torch.iinfo(torch.int64)
    return (torch.randint(bounds.min, bounds.max, (_HASH_BLOCK,), generator=generator) | 1).to(device)


def _groups(tensors: Sequence[Tensor], limit_bytes: int) -> Iterator[list[Tensor]]:
    group: list[Tensor] = []
    for tensor in tensors:
        if group and sum(member.nbytes for member in group) + tensor.nbytes > limit_bytes:
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def _places(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    named = listed([f"{rank} ({hosts[rank]})" for rank in ranks], _NAMED_RANKS)
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {named}"
