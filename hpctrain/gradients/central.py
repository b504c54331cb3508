"""The synchronous parameter server: rank 0 takes in every rank's gradients, adds them and hands the sum out.

A baseline for comparisons, not a way to train: all traffic passes the link of one rank. Engines have a reduce of
their own, but along a tree or a ring, which relieves just that link; here the server receives each buffer whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hpctrain.comm.base import Communicator, Work
from hpctrain.gradients.ordered import SUMMED_BY_KERNELS, tree_sum_
from hpctrain.gradients.reduction import StagedReduction
from hpctrain.kernels.base import Kernels
from hpctrain.kernels.registry import kernels_for


class CentralReduction(StagedReduction):
    """Sum in the order of ranks, in float32 where that is wider: the same bits on every engine.

    With N ranks and a buffer of B bytes, rank 0 receives (N - 1) B and every other rank sends B and receives B;
    (N - 1) B of sums leave rank 0, some of them by way of other ranks where the engine broadcasts along a tree.
    Rank 0 keeps N buffers beside its own.
    """

    def __init__(self, comm: Communicator, buffer: Tensor, kernels: Kernels | None = None) -> None:
        super().__init__(comm, buffer)
        self._received: Tensor | None = None
        self._kernels = None
        if comm.rank == 0:
            self._received = buffer.new_empty(comm.world_size * buffer.numel())
            if buffer.dtype in SUMMED_BY_KERNELS:
                self._kernels = kernels or kernels_for(buffer.device)

    def stages(self) -> Sequence[Callable[[], Work]]:
        return [lambda: self.comm.gather_(self._received, self.buffer), self._hand_out]

    def _hand_out(self) -> Work:
        if self._received is not None:
            rows = self._received.view(self.comm.world_size, self.buffer.numel())
            if self._kernels is None:
                self.buffer.copy_(tree_sum_(rows))
            else:
                self._kernels.sum_rows(rows.unbind(), self.buffer)
        return self.comm.broadcast_(self.buffer)
