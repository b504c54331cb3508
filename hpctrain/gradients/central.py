"""The synchronous parameter server: rank 0 takes in every rank's gradients, adds them and hands the sum out.

A baseline for comparisons, not a way to train: all traffic passes the link of one rank. Engines have a reduce of
their own, but along a tree or a ring, which relieves just that link; here the server receives each buffer whole.
"""

from __future__ import annotations

from torch import Tensor

from hpctrain.comm.base import Communicator, Work
from hpctrain.gradients.ordered import SUMMED_BY_KERNELS, tree_sum_
from hpctrain.gradients.reduction import Reduction
from hpctrain.kernels.registry import kernels_for


class CentralReduction(Reduction):
    """Sum in the order of ranks, in float32 where that is wider: the same bits on every engine.

    With N ranks and a buffer of B bytes, rank 0 receives (N - 1) B and every other rank sends B and receives B;
    (N - 1) B of sums leave rank 0, some of them by way of other ranks where the engine broadcasts along a tree.
    Rank 0 keeps N buffers beside its own.
    """

    _work: Work

    def __init__(self, comm: Communicator, buffer: Tensor) -> None:
        super().__init__(comm, buffer)
        self._received: Tensor | None = None
        if comm.rank == 0:
            self._received = buffer.new_empty(comm.world_size * buffer.numel())
            self._kernels = kernels_for(buffer.device) if buffer.dtype in SUMMED_BY_KERNELS else None

    def start(self) -> None:
        self._work = self.comm.gather_(self._received, self.buffer)

    def proceed(self) -> None:
        self._work.wait()
        if self._received is not None:
            rows = self._received.view(self.comm.world_size, self.buffer.numel())
            if self._kernels is None:
                self.buffer.copy_(tree_sum_(rows))
            else:
                self._kernels.sum_rows(rows.unbind(), self.buffer)
        self._work = self.comm.broadcast_(self.buffer)

    def wait(self) -> None:
        self._work.wait()
