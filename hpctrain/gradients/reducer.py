"""From each rank's gradients to their mean over all workers, hidden behind the backward pass where possible.

The exchange watches a model's parameters, moves their gradients onto the wire and hands full buckets to
the engine while the backward pass goes on. It computes no gradients and moves no parameters.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from hpctrain.arena import LAST_BUCKET_BYTES, Arena, Bucket
from hpctrain.comm.base import Communicator
from hpctrain.errors import MachineError
from hpctrain.gradients.agreement import check_agreement, describe_buckets
from hpctrain.gradients.lanes import Lane
from hpctrain.gradients.reduction import complete
from hpctrain.gradients.registry import WIRES, find
from hpctrain.gradients.tally import ExchangeStats, Tally
from hpctrain.gradients.transport import Transport
from hpctrain.gradients.verdict import Jury, Verdict
from hpctrain.gradients.wire import FeedbackWire, PlainWire
from hpctrain.kernels.registry import kernels_for


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

    ``grid`` is the length and number of the rows of ``reduction="grid"``. A narrow ``compression`` may overflow: each
    step then ends with a verdict, which ``judge`` asks for in any case, and ``norm`` with the norm in it. Raises
    UserError when reduction or compression is not known, when the engine cannot sum the wire's type, or when ranks
    hold different models.
    """

    def __init__(
        self,
        model: Module,
        comm: Communicator,
        *,
        reduction: str = "auto",
        compression: str = "none",
        bucket_bytes: int = 16 << 20,
        last_bucket_bytes: int = LAST_BUCKET_BYTES,
        grid: tuple[int, int] | None = None,
        judge: bool = False,
        norm: bool = False,
    ) -> None:
        self._comm = comm
        self._named = list(model.named_parameters())
        self._wire, self._wire_dtype = find("compression", WIRES, compression)
        self._norm, self._judges = norm, judge or norm or self._wire_dtype is not None
        self._kernels = kernels_for(comm.device)
        self.transport = Transport(comm, reduction, self._wire_dtype or torch.float32, self._kernels, grid)
        self._jury = Jury(comm, share=self.transport.shares_memory) if self._judges else None
        self._bucket_bytes, self._last_bucket_bytes = bucket_bytes, last_bucket_bytes
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._lanes: list[Lane] = []
        self._inside = self._last = False
        self._scale: float | None = None
        self.tally = Tally(torch.zeros(4, dtype=torch.int64, device=comm.device))
        self._counted: Tensor | None = None
        # On the host, spent gradients are kept until the next pass begins: given back to glibc one by one during
        # the backward pass, their pages return to the system and fault in again, which costs more than the copy.
        self._spent: list[Tensor] = []
        self._plan()

    def _plan(self) -> None:
        self._release()
        self._trainable = [parameter.requires_grad for _, parameter in self._named]
        self._parameters = [entry for entry in self._named if entry[1].requires_grad and entry[1].numel()]
        ranks = self._comm.world_size
        # One rank has nobody to send to: autograd's own gradients stay where they are.
        self._arena = Arena(
            self._parameters if ranks > 1 else [],
            bucket_bytes=self._bucket_bytes,
            last_bytes=self._last_bucket_bytes,
            parts=ranks,
            # Where a wire has no buffer of its own, the bucket is what the engine is handed.
            allocate=self.transport.allocate if self._wire_dtype is None else None,
        )
        check_agreement(self._comm, describe_buckets(self._arena.buckets))
        self._lanes = [self._make_lane(bucket) for bucket in self._arena.buckets]

    def _make_lane(self, bucket: Bucket) -> Lane:
        flat, workers = bucket.buffer, self._comm.world_size
        if self._wire_dtype is None or flat.dtype != torch.float32:
            lane = Lane(bucket, PlainWire(flat, flat, self._kernels, workers), self.transport.reduction_of(flat))
        else:
            buffer = self.transport.allocate(flat.numel(), self._wire_dtype)
            # Between encode and decode the bucket is idle.
            scratch = flat.view(self._wire_dtype)[: flat.numel()]
            wire = self._wire(flat, buffer, self._kernels, workers)
            lane = Lane(bucket, wire, self.transport.reduction_of(buffer, scratch))

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
    def accumulate(self, *, last: bool, scale: float = 1.0, count: bool = False) -> Iterator[None]:
        """Around one forward and one backward pass; ``last`` lets full buckets start on their way.

        ``scale`` multiplies the gradients, the same in all passes of a step: 1 / micro-batches, 1 / loss scale.
        With ``count`` the step adds to ``tally`` what rounding did to this rank's gradients, at the cost of a pass.
        Raises MachineError when a ``.grad`` was set by others since the last step.
        """
        self._spent.clear()
        self._counted = self.tally.rounding if count else None
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

    def _arrived(self, lane: Lane) -> None:
        """A gradient of ``lane`` is complete for this pass; called by autograd."""
        if not self._inside or not lane.pending:
            raise MachineError("run backward() once inside each exchange.accumulate(), and never outside of it")
        lane.pending -= 1
        if lane.pending:
            return
        if not (self._last and lane.goes_straight):
            self._pack(lane)
        # Ranks may fill their buckets in different orders, but must hand them to the engine in the same one.
        while self._last and self._next < len(self._lanes) and self._lanes[self._next].may_go:
            self._launch()

    def _pack(self, lane: Lane) -> None:
        assert self._scale is not None
        # A wire with a type of its own divides by the number of workers when it comes back.
        workers = 1 if lane.wire.divides else self._comm.world_size
        with torch.no_grad():
            self._keep(lane.pack(self._scale / workers))

    def _keep(self, spent: list[Tensor]) -> None:
        if self._comm.device.type == "cpu":
            self._spent += spent

    def _launch(self) -> None:
        assert self._scale is not None
        with torch.no_grad():
            missing, spent = self._lanes[self._next].send(self._scale, self._counted)
            self._next += 1
            for lane in self._lanes[: self._next]:
                lane.reduction.poll()
        self._missing += missing
        self._keep(spent)

    @torch.no_grad()
    def finish(self) -> ExchangeStats:
        """Complete the exchange and put the means into ``.grad``.

        Raises MachineError when the engine reports a failure.
        """
        assert self._last, "finish() follows accumulate(last=True)"
        assert self._scale is not None
        started = time.perf_counter()
        early = self._next
        self._launch_rest()
        complete([lane.reduction for lane in self._lanes])
        figures = [lane.finish(judge=self._judges, norm=self._norm) for lane in self._lanes]
        for lane in self._lanes:
            lane.release()
        self._arena.attach()
        if not self._lanes:
            self._complete_alone(self._scale)
        verdict = self._judge([found for found in figures if found is not None])
        exposed_s = time.perf_counter() - started
        self._scale, self._last = None, False
        buffer_bytes = sum(buffer.nbytes for buffer in self.buffers)
        return ExchangeStats(len(self._lanes), early, self._missing, buffer_bytes, exposed_s, verdict)

    def _launch_rest(self) -> None:
        assert self._scale is not None
        rest = self._lanes[self._next :]
        for lane in rest:
            if not lane.goes_straight:
                self._pack(lane)
        cold = [lane for lane in rest if lane.wire.is_cold]
        if cold:
            assert self._jury is not None
            found = self._jury.largest(torch.stack([lane.magnitude(self._scale) for lane in cold]))
            for lane, magnitude in zip(cold, found.tolist(), strict=True):
                lane.wire.agree(magnitude)
        for _ in rest:
            self._launch()

    def _judge(self, figures: list[Tensor]) -> Verdict | None:
        if self._jury is None:
            return None
        if not self._lanes:
            figures = [self._kernels.measure(self.gradients, norm=self._norm)]
        verdict = self._jury.judge(figures, norm=self._norm)
        for lane, magnitude in zip(self._lanes, verdict.magnitudes, strict=False):
            lane.wire.agree(magnitude)
        self.tally.skipped += not verdict.finite
        return verdict

    def _complete_alone(self, scale: float) -> None:
        for _, parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
                self._missing += 1
        if scale != 1.0:
            torch._foreach_mul_(self.gradients, scale)

    @torch.no_grad()
    def clip_(self, max_norm: float, norm: float) -> None:
        """Shrink the mean gradients, whose norm is ``norm``, to ``max_norm`` where they are longer."""
        if norm > max_norm:
            torch._foreach_mul_(self.gradients, max_norm / norm)

    @property
    def residuals(self) -> list[Tensor]:
        """What error feedback keeps for the next step, by bucket; without it, nothing."""
        return [lane.wire.residual for lane in self._lanes if isinstance(lane.wire, FeedbackWire)]

    def state_dict(self) -> dict[str, Any]:
        """What the next step's scales follow from, as JSON."""
        return {"magnitudes": [lane.wire.magnitude for lane in self._lanes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``; where the buckets are others, their magnitudes are measured anew."""
        if len(state["magnitudes"]) == len(self._lanes):
            for lane, magnitude in zip(self._lanes, state["magnitudes"], strict=True):
                lane.wire.magnitude = magnitude

    def _release(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for lane in self._lanes:
            lane.reduction.close()
        self.transport.forget()
        self._lanes = []

    def close(self) -> None:
        """Stop watching the parameters; their ``.grad`` stays."""
        self._release()
        if self._jury is not None:
            self._jury.close()
