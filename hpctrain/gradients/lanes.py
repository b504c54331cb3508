"""One bucket and its way to the other ranks: which gradients have come, how they get on the wire, and back.

The order of the buckets, and when each may go, is the business of ``hpctrain.gradients.reducer``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpctrain.arena import Bucket, Slot
from hpctrain.gradients.reduction import Reduction
from hpctrain.gradients.wire import Wire
from hpctrain.kernels.base import Piece


class Lane:
    """A bucket, its wire and its reduction, and their state within a step.

    Gradients go straight onto a wire that takes them, in one pass; else, and where a step has several backward
    passes, they are summed in the bucket first.
    """

    def __init__(self, bucket: Bucket, wire: Wire, reduction: Reduction) -> None:
        self.bucket = bucket
        self.wire = wire
        self.reduction = reduction
        #: gradients still to come in this backward pass
        self.pending = 0
        self._filled = [False] * len(bucket.slots)

    def begin(self) -> None:
        """A step begins: nothing has come yet."""
        self._filled = [False] * len(self._filled)
        # A wire of the bucket itself is written with the first gradient.
        self.reduction.begin()

    @property
    def goes_straight(self) -> bool:
        """Whether what came last need not pass through the bucket."""
        return self.wire.takes_gradients and not any(self._filled)

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

    @property
    def may_go(self) -> bool:
        """Whether all gradients have come, and the wire knows how to carry them."""
        return not self.pending and not self.wire.is_cold

    def send(self, unit: float, counted: Tensor | None) -> tuple[int, list[Tensor]]:
        """Start the reduction of the bucket, or of ``unit`` times the fresh gradients where they go straight.

        Parameters without a gradient send zeros. Returns their number, and the gradients, no longer needed. What
        rounding did is added to ``counted`` (see ``Wire.encode``).
        """
        spent: list[Tensor] = []
        if self.goes_straight:
            pieces, missing, spent = self._take()
            self.wire.encode(pieces, unit, counted)
        else:
            missing = self._zero_missing()
            self.wire.encode([Piece(self.bucket.buffer, 0)], 1.0, counted)
        self.reduction.start()
        return missing, spent

    def _take(self) -> tuple[list[Piece], int, list[Tensor]]:
        pieces: list[Piece] = []
        spent: list[Tensor] = []
        missing = 0
        for slot in self.bucket.slots:
            gradient = slot.parameter.grad
            if gradient is None:
                self.wire.buffer[slot.start : slot.start + slot.view.numel()].zero_()
                missing += 1
                continue
            slot.parameter.grad = None
            pieces.append(Piece(_flat(gradient, slot), slot.start))
            spent.append(gradient)
        return pieces, missing, spent

    def _zero_missing(self) -> int:
        missing = [slot for slot, filled in zip(self.bucket.slots, self._filled, strict=True) if not filled]
        for slot in missing:
            slot.view.zero_()
        return len(missing)

    def magnitude(self, unit: float) -> Tensor:
        """Largest magnitude of what ``send(unit)`` would send, float64 []; inf when any of it is not finite."""
        if self.goes_straight:
            gradients = [slot.parameter.grad for slot in self.bucket.slots if slot.parameter.grad is not None]
            return self.wire.kernels.measure(gradients, norm=False)[0] * unit
        packed = [slot.view for slot, filled in zip(self.bucket.slots, self._filled, strict=True) if filled]
        return self.wire.kernels.measure(packed, norm=False)[0]

    def finish(self, *, judge: bool, norm: bool) -> Tensor | None:
        """Wait for the sum and bring the mean into the bucket; with ``judge`` returns what ``Wire.decode`` does."""
        self.reduction.wait()
        share = self.reduction.share if judge else None
        figures = self.wire.decode(self.reduction.parts, share, norm=norm)
        self.reduction.end()
        return figures

    def release(self) -> None:
        """Return when the bucket belongs to this rank alone."""
        if self.wire.buffer is self.bucket.buffer:
            # The peers read it where memory is shared.
            self.reduction.begin()


def _flat(gradient: Tensor, slot: Slot) -> Tensor:
    """The gradient's elements in the order of the slot: a view where they lie in it, as autograd arranges."""
    theirs, ours = gradient.stride(), slot.view.stride()
    if theirs != ours and any(
        size > 1 and one != other for size, one, other in zip(slot.view.size(), theirs, ours, strict=True)
    ):
        gradient = torch.empty_like(slot.view).copy_(gradient)
    return gradient.as_strided((gradient.numel(),), (1,))
