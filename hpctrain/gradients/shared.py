"""The ordered sum where all ranks sit on one host: each adds its chunk while it reads its peers' memory.

Nothing is sent, and nothing copied but by who needs it. The bits are those of ``hpctrain.gradients.ordered``.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hpctrain.comm.base import Communicator, Window
from hpctrain.gradients.reduction import Reduction
from hpctrain.kernels.base import Kernels


class SharedReduction(Reduction):
    """``buffer`` [n], this rank's part of ``window``; n must be a multiple of the world size.

    The sum stays where its summands were: chunk r of it in the memory of rank r, which is what ``parts`` tells.
    """

    def __init__(self, comm: Communicator, window: Window, buffer: Tensor, kernels: Kernels) -> None:
        super().__init__(comm, buffer)
        self._window = window
        self._kernels = kernels
        rows = [part.view(buffer.dtype)[: buffer.numel()].view(comm.world_size, -1) for part in window.parts]
        self._summands = [row[comm.rank] for row in rows]
        self._sums = [row[rank] for rank, row in enumerate(rows)]
        self._is_summed = False

    def begin(self) -> None:
        # The peers may still be reading the sum of the step before.
        self._window.wait(self._window.posted)

    def start(self) -> None:
        self._is_summed = False
        self._window.post()

    def poll(self) -> None:
        if not self._is_summed and self._window.reached(self._window.posted):
            self.proceed()

    def proceed(self) -> bool:
        if self._is_summed:
            return False
        self._window.wait(self._window.posted)
        self._kernels.sum_rows(self._summands, self._summands[self.comm.rank])
        self._is_summed = True
        self._window.post()
        return False

    def wait(self) -> None:
        self._window.wait(self._window.posted)

    def end(self) -> None:
        self._window.post()

    @property
    def parts(self) -> Sequence[Tensor]:
        return self._sums

    def close(self) -> None:
        self._summands = self._sums = []
        self._window.close()
