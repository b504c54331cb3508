"""From each rank's gradients to their mean over all workers, hidden behind the backward pass where possible.

The exchange watches a model's parameters, moves their gradients into flat buckets and hands full buckets to
the engine while the backward pass goes on. It computes no gradients and moves no parameters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from hpctrain.arena import Arena, Bucket
from hpctrain.comm.base import Communicator
from hpctrain.errors import MachineError
from hpctrain.gradients.agreement import check_agreement, describe_buckets
from hpctrain.gradients.reduction import Reduction
from hpctrain.gradients.registry import REDUCTIONS, WIRES, find
from hpctrain.gradients.wire import Wire


@dataclass(frozen=True, slots=True)
class ExchangeStats:
    """One exchange, as this rank saw it.

    ``buffer_bytes`` is what the engine was handed; ``early`` of ``buckets`` were launched during the backward
    pass; ``missing`` parameters had no gradient here and sent zeros. ``exposed_s`` is the host's time in
    ``finish``: on a GPU, where waiting only orders streams, measure with events around ``finish`` instead.
    """

    buckets: int
    early: int
    missing: int
    buffer_bytes: int
    exposed_s: float


class _Lane:
    """One bucket with its way to the other ranks and its state within a step."""

    def __init__(self, bucket: Bucket, wire: Wire, reduction: Reduction) -> None:
        self.bucket = bucket
        self.wire = wire
        self.reduction = reduction
        self.pending = 0
        self._filled = [False] * len(bucket.slots)

    def begin(self) -> None:
        self._filled = [False] * len(self._filled)

    def pack(self, scale: float) -> list[Tensor]:
        """Add ``scale`` times each fresh gradient to the bucket; returns the gradients, no longer needed."""
        spent = []
        for index, slot in enumerate(self.bucket.slots):
            gradient = slot.parameter.grad
            if gradient is None:
                continue
            if self._filled[index]:
                slot.view.add_(gradient, alpha=scale)
            else:
                torch.mul(gradient, scale, out=slot.view)
            self._filled[index] = True
            slot.parameter.grad = None
            spent.append(gradient)
        return spent

    def launch(self) -> int:
        """Start the reduction; parameters without a gradient send zeros. Returns their number."""
        missing = [slot for slot, filled in zip(self.bucket.slots, self._filled, strict=True) if not filled]
        for slot in missing:
            slot.view.zero_()
        self.wire.encode()
        self.reduction.start()
        return len(missing)


class GradientExchange:
    """Means of gradients over all workers, once an optimizer step. All methods are collective.

    A step is any number of ``accumulate`` blocks, the last one marked, then ``finish``::

        with exchange.accumulate(last=True):
            loss_of(model).backward()
        stats = exchange.finish()

    ``finish`` leaves in every ``.grad`` the sum over micro-batches and the mean over workers of ``scale`` times
    the gradients. With several ranks ``.grad`` is a view of a bucket; parameters that got no gradient, on this
    rank or on all, take part with zeros. With one rank nothing is copied. Parameters may be frozen or released
    between steps, on all ranks alike: the next step is planned anew.

    Raises UserError when reduction or compression is not known or ranks hold different models.
    """

    def __init__(
        self,
        model: Module,
        comm: Communicator,
        *,
        reduction: str = "engine",
        compression: str = "none",
        bucket_bytes: int = 16 << 20,
    ) -> None:
        self._comm = comm
        self._named = list(model.named_parameters())
        self._reduction = find("reduction", REDUCTIONS, reduction)
        self._wire = find("compression", WIRES, compression)
        self._bucket_bytes = bucket_bytes
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._inside = self._last = False
        self._scale: float | None = None
        # On the host, packed gradients are kept until the next pass begins: given back to glibc one by one during
        # the backward pass, their pages return to the system and fault in again, which costs more than the copy.
        self._spent: list[Tensor] = []
        self._plan()

    def _plan(self) -> None:
        self.close()
        self._trainable = [parameter.requires_grad for _, parameter in self._named]
        self._parameters = [entry for entry in self._named if entry[1].requires_grad and entry[1].numel()]
        ranks = self._comm.world_size
        # One rank has nobody to send to: autograd's own gradients stay where they are.
        shared = self._parameters if ranks > 1 else []
        self._arena = Arena(shared, bucket_bytes=self._bucket_bytes, parts=ranks)
        check_agreement(self._comm, describe_buckets(self._arena.buckets))
        self._lanes = [self._make_lane(bucket) for bucket in self._arena.buckets]

    def _make_lane(self, bucket: Bucket) -> _Lane:
        wire = self._wire(bucket.buffer)
        lane = _Lane(bucket, wire, self._reduction(self._comm, wire.buffer))

        def arrived(_: Parameter) -> None:
            self._arrived(lane)

        for slot in bucket.slots:
            handle = slot.parameter.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            self._hooks.append(handle)
        return lane

    @property
    def buffers(self) -> list[Tensor]:
        """What the engine is handed in a step, in that order; with one rank nothing is."""
        return [lane.wire.buffer for lane in self._lanes]

    @property
    def gradients(self) -> list[Tensor]:
        """After ``finish``: tensors that together hold every mean gradient (and perhaps padding zeros)."""
        if self._lanes:
            return [lane.bucket.buffer for lane in self._lanes]
        return [parameter.grad for _, parameter in self._parameters if parameter.grad is not None]

    @contextmanager
    def accumulate(self, *, last: bool, scale: float = 1.0) -> Iterator[None]:
        """Around one forward and one backward pass; ``last`` lets full buckets start on their way.

        ``scale`` multiplies the gradients, the same in all passes of a step: 1 / micro-batches, 1 / loss scale.
        Raises MachineError when a ``.grad`` was set by others since the last step.
        """
        self._spent.clear()
        if self._scale is None:
            self._begin_step()
        assert self._scale in (None, scale), "one scale for all passes of a step"
        self._scale, self._last = scale, last
        for lane in self._lanes:
            lane.pending = len(lane.bucket.slots)
        self._inside = True
        try:
            yield
        finally:
            self._inside = False
        if not last:
            for lane in self._lanes:
                self._pack(lane)

    def _begin_step(self) -> None:
        if self._trainable != [parameter.requires_grad for _, parameter in self._named]:
            # A frozen parameter must not keep its last gradient: the optimizer would go on applying it.
            for _, parameter in self._named:
                parameter.grad = None
            self._plan()
        self._arena.detach()
        if not self._lanes:
            for _, parameter in self._parameters:
                parameter.grad = None
        for lane in self._lanes:
            lane.begin()
        self._next = self._missing = 0

    def _arrived(self, lane: _Lane) -> None:
        """A gradient of ``lane`` is complete for this pass; called by autograd."""
        if not self._inside or not lane.pending:
            raise MachineError("run backward() once inside each exchange.accumulate(), and never outside of it")
        lane.pending -= 1
        if lane.pending:
            return
        self._pack(lane)
        # Ranks may fill their buckets in different orders, but must hand them to the engine in the same one.
        while self._last and self._next < len(self._lanes) and not self._lanes[self._next].pending:
            self._launch()

    def _pack(self, lane: _Lane) -> None:
        assert self._scale is not None
        with torch.no_grad():
            spent = lane.pack(self._scale / self._comm.world_size)
        if self._comm.device.type == "cpu":
            self._spent += spent

    def _launch(self) -> None:
        with torch.no_grad():
            self._missing += self._lanes[self._next].launch()
        self._next += 1

    @torch.no_grad()
    def finish(self) -> ExchangeStats:
        """Complete the exchange and put the means into ``.grad``.

        Raises MachineError when the engine reports a failure.
        """
        assert self._last, "finish() follows accumulate(last=True)"
        assert self._scale is not None
        started = time.perf_counter()
        early = self._next
        while self._next < len(self._lanes):
            self._pack(self._lanes[self._next])
            self._launch()
        for lane in self._lanes:
            lane.reduction.proceed()
        for lane in self._lanes:
            lane.reduction.wait()
            lane.wire.decode()
        exposed_s = time.perf_counter() - started
        self._arena.attach()
        if not self._lanes:
            self._complete_alone(self._scale)
        self._scale, self._last = None, False
        buffer_bytes = sum(buffer.nbytes for buffer in self.buffers)
        return ExchangeStats(len(self._lanes), early, self._missing, buffer_bytes, exposed_s)

    def _complete_alone(self, scale: float) -> None:
        for _, parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                self._missing += 1
        if scale != 1.0:
            torch._foreach_mul_(self.gradients, scale)

    def close(self) -> None:
        """Stop watching the parameters; their ``.grad`` stays."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
