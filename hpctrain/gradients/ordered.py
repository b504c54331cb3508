"""A sum whose bits do not depend on the engine: all-to-all of chunks, a pairwise tree, all-gather.

Engines only move bytes here, as many as a ring does (2 (N - 1) / N of the buffer out of each rank); the order
of the additions is that of the worker numbers. Where the workers of a rank form a subtree (powers of two), the
result is also the same for every split of the workers over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator, Work
from hpctrain.gradients.reduction import StagedReduction
from hpctrain.kernels.base import Kernels
from hpctrain.kernels.registry import kernels_for

SUMMED_BY_KERNELS = (torch.float16, torch.bfloat16, torch.float32)


def tree_sum_(rows: Tensor) -> Tensor:
    """Sum ``rows`` [w, n] pairwise, neighbours first, into ``rows[0]``, which is returned; the rest is scratch.

    The tree is ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)) …; a row without a partner waits for the next level.
    """
    count, stride = rows.size(0), 1
    while stride < count:
        rows[: count - stride : 2 * stride].add_(rows[stride :: 2 * stride])
        stride *= 2
    return rows[0]


class OrderedReduction(StagedReduction):
    """Each rank sums a chunk of the buffer, in float32 where that is wider; the length must be a multiple of the world
    size. ``scratch`` [n], of the buffer's type, takes in the peers' chunks.

    Without it the buffer goes in two halves, one after the other, if the world size divides them, and memory for one
    is allocated.
    """

    def __init__(
        self, comm: Communicator, buffer: Tensor, scratch: Tensor | None = None, kernels: Kernels | None = None
    ) -> None:
        super().__init__(comm, buffer)
        halves = 2 if scratch is None and buffer.numel() % (2 * comm.world_size) == 0 else 1
        self._parts = buffer.chunk(halves)
        self._received = torch.empty_like(self._parts[0]) if scratch is None else scratch
        self._kernels = None
        if buffer.dtype in SUMMED_BY_KERNELS:
            self._kernels = kernels or kernels_for(buffer.device)

    def stages(self) -> Sequence[Callable[[], Work]]:
        return [partial(stage, part) for part in self._parts for stage in (self._hand_round, self._sum)]

    def _hand_round(self, part: Tensor) -> Work:
        return self.comm.all_to_all_(self._received, part)

    def _sum(self, part: Tensor) -> Work:
        rows = self._received.view(self.comm.world_size, -1)
        if self._kernels is None:
            tree_sum_(rows)
        else:
            self._kernels.sum_rows(rows.unbind(), rows[0])
        return self.comm.all_gather_(part, rows[0])
