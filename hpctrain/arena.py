"""Gradients as a few flat buffers instead of many small tensors.

An arena decides which parameter's gradient lies where and holds the memory; it neither fills the buffers nor
sends them (``hpctrain.gradients`` does).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from hpctrain.errors import MachineError

#: Start of every gradient and of every equal part of a bucket: a cache line, and more than any vector load.
ALIGNMENT_BYTES = 64

#: Size of the bucket that is ready last. Nothing is left to hide its communication behind, so it is short.
LAST_BUCKET_BYTES = 1 << 20


#: Gradients of biases and the like. They lie together, so that a kernel may take them all at once: most of the
#: parameters are such, and most of what they cost is the calls.
SMALL_ELEMENTS = 4096

#: Gives memory for so many elements of a dtype, one-dimensional.
Allocate = Callable[[int, torch.dtype], Tensor]


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of one parameter's gradient: ``view``, of its shape and strides, begins at element ``start``."""

    name: str
    parameter: Parameter
    view: Tensor
    start: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """One contiguous ``buffer`` [n] and the gradients in it; what lies between and behind them stays zero."""

    buffer: Tensor
    slots: tuple[Slot, ...]


def plan_buckets(sizes_bytes: Sequence[int], bucket_bytes: int, last_bytes: int) -> list[range]:
    """Cut the sequence of gradients, in the order in which they become ready, into consecutive buckets.

    A bucket holds at most ``bucket_bytes``, or one gradient that is larger; the last one at most
    ``last_bytes``, unless the last gradient alone is larger.
    """
    tail, tail_bytes = len(sizes_bytes), 0
    while tail and tail_bytes + sizes_bytes[tail - 1] <= min(last_bytes, bucket_bytes):
        tail -= 1
        tail_bytes += sizes_bytes[tail]
    buckets, start, filled = [], 0, 0
    for position in range(tail):
        if position > start and filled + sizes_bytes[position] > bucket_bytes:
            buckets.append(range(start, position))
            start, filled = position, 0
        filled += sizes_bytes[position]
    if start < tail:
        buckets.append(range(start, tail))
    if tail < len(sizes_bytes):
        buckets.append(range(tail, len(sizes_bytes)))
    return buckets


class Arena:
    """Flat gradient buckets for ``parameters``, given in the order of their registration.

    Backward passes reach the last registered parameters first, so buckets are filled from the end. Each
    bucket has one dtype, divides into ``parts`` equal aligned parts and lies where ``allocate`` puts it, by default
    beside the parameters. Buckets come in the order in which they are expected to be full.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Parameter]],
        *,
        bucket_bytes: int,
        last_bytes: int = LAST_BUCKET_BYTES,
        parts: int = 1,
        allocate: Allocate | None = None,
    ) -> None:
        by_dtype: dict[torch.dtype, list[tuple[int, str, Parameter]]] = {}
        for position, (name, parameter) in enumerate(reversed(list(parameters))):
            by_dtype.setdefault(parameter.dtype, []).append((position, name, parameter))
        ready: list[tuple[int, Bucket]] = []
        for entries in by_dtype.values():
            sizes = [_aligned_elements(parameter) * parameter.element_size() for _, _, parameter in entries]
            for span in plan_buckets(sizes, bucket_bytes, last_bytes):
                members = entries[span.start : span.stop]
                ready.append((members[-1][0], _make_bucket([member[1:] for member in members], parts, allocate)))
        self.buckets = tuple(bucket for _, bucket in sorted(ready, key=lambda entry: entry[0]))
        self._slots = [slot for bucket in self.buckets for slot in bucket.slots]

    def attach(self) -> None:
        """Make every parameter's ``.grad`` its view of the bucket."""
        for slot in self._slots:
            slot.parameter.grad = slot.view

    def detach(self) -> None:
        """Make every ``.grad`` None, so that the next backward pass hands over fresh gradients.

        Raises MachineError when one is neither None nor the arena's view: it would be lost unseen.
        """
        for slot in self._slots:
            if slot.parameter.grad is not None and slot.parameter.grad is not slot.view:
                raise MachineError(
                    f"the .grad of parameter {slot.name!r} was set outside of the gradient exchange; "
                    "change gradients in place, between finish() and the optimizer's step"
                )
            slot.parameter.grad = None


def _aligned_elements(parameter: Parameter) -> int:
    step = ALIGNMENT_BYTES // parameter.element_size()
    return -(-parameter.numel() // step) * step


def _make_bucket(members: Sequence[tuple[str, Parameter]], parts: int, allocate: Allocate | None) -> Bucket:
    first = members[0][1]
    members = sorted(members, key=lambda member: member[1].numel() <= SMALL_ELEMENTS)
    starts, end = [], 0
    for _, parameter in members:
        starts.append(end)
        end += _aligned_elements(parameter)
    step = parts * ALIGNMENT_BYTES // first.element_size()
    length = -(-end // step) * step
    buffer = allocate(length, first.dtype) if allocate else torch.empty(length, dtype=first.dtype, device=first.device)
    buffer.zero_()
    first_at = buffer.storage_offset()
    slots = tuple(
        Slot(name, parameter, buffer.as_strided(parameter.size(), dense_strides(parameter), first_at + start), start)
        for (name, parameter), start in zip(members, starts, strict=True)
    )
    return Bucket(buffer, slots)


def dense_strides(tensor: Tensor) -> tuple[int, ...]:
    """The tensor's strides where it fills its memory without gaps (channels_last too), else contiguous ones."""
    return torch.empty_like(tensor, device="meta", memory_format=torch.preserve_format).stride()
