"""What all ranks decide a step by: whether its gradients are finite, how large they are, and their norm.

The mean is the same on every rank, but a figure of it need not be: sums are taken in an order that depends on the
number of threads, and a sum at the edge of the range may overflow in one order only. So figures are agreed on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator, NoWindow, Window

_WINDOW_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """Largest magnitude of each bucket of the mean, inf where it is not finite; the norm of the whole if asked for."""

    magnitudes: tuple[float, ...]
    norm: float | None

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.magnitudes))


class Jury:
    """The largest of each figure over all ranks: through the engine, or through memory that they share."""

    def __init__(self, comm: Communicator, *, share: bool) -> None:
        self._comm = comm
        window = comm.open_window(_WINDOW_BYTES) if share else None
        self._window = None if isinstance(window, NoWindow) else window

    def judge(self, figures: Sequence[Tensor], *, norm: bool) -> Verdict:
        """The verdict on buckets whose own figures, float64 [2] each, are ``Kernels.widen``'s. Collective."""
        if not figures:
            return Verdict((), 0.0 if norm else None)
        table = torch.stack(list(figures))
        if not norm:
            return Verdict(tuple(self.largest(table[:, 0]).tolist()), None)
        *magnitudes, squares = self.largest(torch.cat([table[:, 0], table[:, 1].sum().reshape(1)])).tolist()
        return Verdict(tuple(magnitudes), math.sqrt(squares))

    def largest(self, values: Tensor) -> Tensor:
        """Elementwise maximum over ranks of ``values`` float64 [n]; NaN counts as inf. Collective."""
        values = torch.where(values.isnan(), torch.inf, values)
        if self._comm.world_size == 1:
            return values
        if self._window is None or values.nbytes > _WINDOW_BYTES:
            self._comm.all_reduce_(values, "max").wait()
            return values
        rows = [part.view(torch.float64)[: values.numel()] for part in self._window.parts]
        rows[self._comm.rank].copy_(values)
        self._meet(self._window)
        found = torch.stack(rows).amax(0)
        # Nobody writes the next figures before all have read these.
        self._meet(self._window)
        return found

    @staticmethod
    def _meet(window: Window) -> None:
        window.post()
        window.wait(window.posted)

    def close(self) -> None:
        """Give the shared memory back."""
        if self._window is not None:
            self._window.close()
