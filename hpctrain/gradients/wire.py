"""What a bucket looks like on its way: the buffer an engine is handed, and the way there and back.

A wire knows nothing of ranks or reductions. ``none`` sends the bucket as it is; the narrow ones send half the bytes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hpctrain.gradients.scale import wire_scale
from hpctrain.kernels.base import Kernels, Piece


class Wire(ABC):
    """The travelling form of one ``bucket`` [n], in ``buffer`` [n], the memory the engine is handed."""

    #: of the mean in an earlier step; None when it is not known
    magnitude: float | None = None
    #: whether ``decode`` divides the sum by the number of workers; else what is packed was divided before
    divides = False
    #: whether ``encode`` takes gradients as autograd made them; else they are packed into the bucket first
    takes_gradients = False

    def __init__(self, bucket: Tensor, buffer: Tensor, kernels: Kernels, workers: int) -> None:
        self.bucket = bucket
        self.buffer = buffer
        self.kernels = kernels
        self.workers = workers

    @property
    def is_cold(self) -> bool:
        """Whether the magnitude of what is to be sent has to be agreed on before the next ``encode``."""
        return False

    @abstractmethod
    def encode(self, pieces: Sequence[Piece], unit: float, counted: Tensor | None) -> None:
        """Bring this rank's gradients into ``buffer``: ``unit`` times ``pieces``, all that are not zero.

        What rounding did to them is added to ``counted``, int64 [4] (``Kernels.count``), where it is given.
        """

    @abstractmethod
    def decode(self, parts: Sequence[Tensor], share: slice | None, *, norm: bool) -> Tensor | None:
        """Bring the mean over workers, out of the sum in ``parts``, into the bucket.

        Returns its figures float64 [2] as ``Kernels.widen`` does where this rank's ``share`` of the bucket to judge
        is given.
        """

    def agree(self, magnitude: float) -> None:
        """Take note of the mean's largest magnitude, the same on all ranks; inf when it is not finite."""
        return


class PlainWire(Wire):
    """The bucket itself: its own dtype, no copy. Divided by the number of workers before it is sent."""

    def encode(self, pieces: Sequence[Piece], unit: float, counted: Tensor | None) -> None:
        return

    def decode(self, parts: Sequence[Tensor], share: slice | None, *, norm: bool) -> Tensor | None:
        start = 0
        for part in parts:
            target = self.bucket[start : start + part.numel()]
            if target.data_ptr() != part.data_ptr():
                target.copy_(part)
            start += part.numel()
        if share is None:
            return None
        return self.kernels.measure([self.bucket if norm else self.bucket[share]], norm=norm)


class NarrowWire(Wire):
    """Gradients rounded once to the buffer's type, scaled so that the sum over workers stays within its range."""

    divides = True
    takes_gradients = True

    def __init__(self, bucket: Tensor, buffer: Tensor, kernels: Kernels, workers: int) -> None:
        super().__init__(bucket, buffer, kernels, workers)
        self._back = 1.0

    @property
    def is_cold(self) -> bool:
        return self.magnitude is None

    def encode(self, pieces: Sequence[Piece], unit: float, counted: Tensor | None) -> None:
        scale = self._scale_for(unit)
        self._narrow(pieces, scale)
        if counted is not None:
            counted += self.kernels.count(pieces, self.buffer, scale)

    def _narrow(self, pieces: Sequence[Piece], scale: float) -> None:
        self.kernels.narrow(pieces, self.buffer, scale)

    def _scale_for(self, unit: float) -> float:
        """The factor on values that are yet to be multiplied by ``unit``; ``decode`` undoes it."""
        scale = wire_scale(self.buffer.dtype, (self.magnitude or 0.0) * self.workers / unit)
        self._back = unit / (scale * self.workers)
        return scale

    def decode(self, parts: Sequence[Tensor], share: slice | None, *, norm: bool) -> Tensor | None:
        return self.kernels.widen(parts, self.bucket, self._back, share or slice(0, 0), norm=norm)

    def agree(self, magnitude: float) -> None:
        # After an overflow, or gradients that were zero, the last step says nothing of the next one.
        self.magnitude = magnitude if 0 < magnitude < float("inf") else None


class FeedbackWire(NarrowWire):
    """What rounding takes from a gradient is added to that of the next step (Seide et al. 2014, section 3).

    ``residual`` [n] float32 is this rank's own, in units of the bucket.
    """

    takes_gradients = False

    def __init__(self, bucket: Tensor, buffer: Tensor, kernels: Kernels, workers: int) -> None:
        super().__init__(bucket, buffer, kernels, workers)
        self.residual = torch.zeros_like(bucket)

    def encode(self, pieces: Sequence[Piece], unit: float, counted: Tensor | None) -> None:
        assert unit == 1.0, "residuals are kept in units of the bucket"
        super().encode(pieces, unit, counted)

    def _narrow(self, pieces: Sequence[Piece], scale: float) -> None:
        self.kernels.narrow_with_feedback(pieces, self.residual, self.buffer, scale)
