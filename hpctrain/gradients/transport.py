"""Which algorithm sums a run's buckets, where their buffers lie, and why.

``auto`` takes what is fastest where the run is: on CPUs of one host the ordered sum through shared memory, elsewhere
the engine's own all-reduce.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator, NoWindow, Window
from hpctrain.gradients.central import CentralReduction
from hpctrain.gradients.grid import GridReduction, Shape
from hpctrain.gradients.ordered import SUMMED_BY_KERNELS, OrderedReduction
from hpctrain.gradients.reduction import Reduction
from hpctrain.gradients.registry import REDUCTIONS, find
from hpctrain.gradients.shared import SharedReduction
from hpctrain.kernels.base import Kernels


class Transport:
    """Makes buffers and their reductions for one exchange. Everything is collective.

    ``name`` and ``reason`` tell the algorithm that was picked. Raises UserError when it is not known, or when the
    engine cannot sum ``dtype``.
    """

    def __init__(
        self, comm: Communicator, requested: str, dtype: torch.dtype, kernels: Kernels, grid: Shape | None = None
    ) -> None:
        self._comm = comm
        self._kernels = kernels
        self._grid = grid
        self._windows: dict[int, Window] = {}
        self.name, self.reason = requested, "asked for"
        self.shares_memory, refusal = False, ""
        alone = comm.world_size == 1
        if requested in ("auto", "ordered") and not alone:
            refusal = self._refusal()
            self.shares_memory = not refusal
        if requested == "auto":
            self.name, self.reason = self._pick(alone, dtype, refusal)
        self._kind = find("reduction", REDUCTIONS, self.name)
        if self.name in ("engine", "grid") and not alone:
            # An engine that cannot sum this type says so now, not in the first step.
            comm.all_reduce_(torch.zeros(comm.world_size, dtype=dtype, device=comm.device)).wait()

    def _refusal(self) -> str:
        """Why the ranks share no memory, or nothing where they do."""
        window = self._comm.open_window(1)
        if isinstance(window, NoWindow):
            return window.reason
        window.close()
        return ""

    def _pick(self, alone: bool, dtype: torch.dtype, refusal: str) -> tuple[str, str]:
        if alone:
            return "engine", "one rank sends nothing"
        if self.shares_memory:
            return "ordered", "the ranks share the memory of one host"
        if dtype not in self._comm.reducible:
            return "ordered", f"the {self._comm.name} engine does not sum {str(dtype).removeprefix('torch.')}"
        return "engine", f"the engine's own all-reduce: {refusal}"

    def forget(self) -> None:
        """The buffers made so far are no longer used; their reductions have given the memory back."""
        self._windows.clear()

    def allocate(self, numel: int, dtype: torch.dtype) -> Tensor:
        """Zeros [numel], in memory that all ranks see where the sum is taken there."""
        if self.shares_memory and dtype in SUMMED_BY_KERNELS:
            window = self._comm.open_window(numel * dtype.itemsize)
            if not isinstance(window, NoWindow):
                buffer = window.parts[self._comm.rank].view(dtype)
                self._windows[buffer.data_ptr()] = window
                return buffer
        return torch.zeros(numel, dtype=dtype, device=self._comm.device)

    def reduction_of(self, buffer: Tensor, scratch: Tensor | None = None) -> Reduction:
        """The reduction of a buffer of ``allocate``; ``scratch`` is idle memory of the same form."""
        window = self._windows.get(buffer.data_ptr())
        if window is not None:
            return SharedReduction(self._comm, window, buffer, self._kernels)
        if self._kind is OrderedReduction:
            return OrderedReduction(self._comm, buffer, scratch, self._kernels)
        if self._kind is CentralReduction:
            return CentralReduction(self._comm, buffer, self._kernels)
        if self._kind is GridReduction:
            return GridReduction(self._comm, buffer, scratch, shape=self._grid)
        return self._kind(self._comm, buffer)
