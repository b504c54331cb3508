"""The operations that are timed: for each its call, its right answer, and the factors of its bandwidth.

Bandwidths are those of NVIDIA's nccl-tests (doc/PERFORMANCE.md there). A size S is that of the whole buffer of a
rank: what an all-reduce or a broadcast is called on, what a reduce-scatter or an all-to-all reads, what an all-gather
fills. Algorithm bandwidth is S / time. Bus bandwidth is that times a factor of the operation and of the number N of
ranks, 2 (N - 1) / N for an all-reduce, (N - 1) / N for reduce-scatter, all-gather and all-to-all, 1 for a broadcast:
the bytes that each rank must send at the least, so that the figure compares with a link's speed whatever N is. The
factor belongs to the operation: algorithms that send more have a lower bus bandwidth.

``steps`` is the number of messages a rank sends one after another in a ring, for the model of
``hpctrain.bench.comm.fit``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hpctrain.bench.comm.pattern import PERIOD, Pattern, Wrong, sent_by, summand, total
from hpctrain.comm.base import Communicator, NoWindow
from hpctrain.errors import UserError
from hpctrain.gradients.reduction import Reduction, reduce_
from hpctrain.gradients.registry import REDUCTIONS
from hpctrain.gradients.shared import SharedReduction
from hpctrain.kernels.registry import kernels_for

#: by the names of gradients.compression and train.precision
SUMMED_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
#: Operations that sum nothing move bytes, whatever they mean; these are whole numbers of 4 bytes.
MOVED_DTYPE = "int32"
_DTYPES = SUMMED_DTYPES | {MOVED_DTYPE: torch.int32}
#: what the reduction `ordered` is where all ranks see the same memory; of its own here, beside the one that sends
SHARED = "shared"
#: A reduction's buffer is a multiple of so many elements a rank; see `hpctrain.gradients`.
_ALIGNMENT = 16
_UNWRITTEN = -1
#: Below it a time is latency, whatever the values are.
_VALUES_MATTER_FROM_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class Case:
    """An operation, the algorithm that does it (``engine``: the engine's own) and the dtype of its buffers."""

    operation: str
    algorithm: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.operation} of {self.dtype} by {self.algorithm}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    def elements(self, size_bytes: int, world_size: int) -> int | None:
        """Elements in ``size_bytes``, rounded up to what the operation divides; None when that leaves none."""
        granule = 1
        if OPERATIONS[self.operation].in_parts:
            granule = world_size
        elif self.algorithm != "engine":
            granule = world_size * _ALIGNMENT
        granule_bytes = granule * self.torch_dtype.itemsize
        return None if size_bytes < granule_bytes else -(-size_bytes // granule_bytes) * granule


class Operation(ABC):
    """One operation on ``buffer`` [n] and, where it does not work in place, ``output`` [n]."""

    #: whether ``buffer`` or ``output`` has one part for each rank
    in_parts: ClassVar[bool] = True

    def __init__(self, comm: Communicator, buffer: Tensor, output: Tensor) -> None:
        self.comm = comm
        self.buffer = buffer
        self.output = output

    @staticmethod
    @abstractmethod
    def bus_factor(world_size: int) -> float:
        """Bus bandwidth over algorithm bandwidth."""

    @staticmethod
    @abstractmethod
    def steps(world_size: int) -> int:
        """Messages one after another in a ring."""

    @abstractmethod
    def refill(self) -> None:
        """Put this rank's values where they are sent from, and none where the result belongs."""

    @abstractmethod
    def run(self) -> None:
        """Do it, to its end. Collective."""

    def most_runs(self) -> int | None:
        """Runs after one refill before values leave the range of the dtype; None for any number."""
        return None

    @abstractmethod
    def expected(self) -> Iterator[tuple[Tensor, Pattern, int]]:
        """Each piece of the result, the sequence it must hold, and from which of its elements on."""

    def close(self) -> None:
        """Give back what it holds beside its buffers. Collective."""
        return

    def find_wrong(self) -> Wrong | None:
        """The first piece of the result that is not as it must be after one run."""
        found = (pattern.find_wrong(piece, start) for piece, pattern, start in self.expected())
        return next((wrong for wrong in found if wrong), None)


def _ring_share(world_size: int) -> float:
    return (world_size - 1) / world_size


class AllReduce(Operation):
    """A sum by one of the reductions of the gradient exchange.

    In place, but for a sum through shared memory: its pieces lie with the ranks that took them, and each rank copies
    them into a buffer of its own. The copy is timed, so that algorithms end with the same thing.
    """

    in_parts = False

    def __init__(self, comm: Communicator, buffer: Tensor, output: Tensor, algorithm: str = "engine") -> None:
        if algorithm == SHARED:
            self._reduction: Reduction = _shared_reduction(comm, buffer)
            super().__init__(comm, self._reduction.buffer, output)
        else:
            super().__init__(comm, buffer, buffer)
            self._reduction = REDUCTIONS[algorithm](comm, buffer)

    @staticmethod
    def bus_factor(world_size: int) -> float:
        return 2 * _ring_share(world_size)

    @staticmethod
    def steps(world_size: int) -> int:
        return 2 * (world_size - 1)

    def refill(self) -> None:
        self._reduction.begin()
        self.output.fill_(_UNWRITTEN)
        summand(self.comm.world_size, self.comm.rank, self.buffer.dtype, self.buffer.device).fill(self.buffer)

    def most_runs(self) -> int | None:
        # Sums of sums grow by the world size each time. Engines that convert fp16 in software are faster at
        # infinities than at numbers.
        if self.buffer.nbytes < _VALUES_MATTER_FROM_BYTES:
            return None
        world_size = self.comm.world_size
        after_first = world_size + PERIOD - 1
        return 1 + int(math.log(torch.finfo(self.buffer.dtype).max / after_first, world_size))

    def run(self) -> None:
        self._reduction.begin()
        reduce_(self._reduction)
        if self.output is not self.buffer:
            torch.cat(list(self._reduction.parts), out=self.output)
        self._reduction.end()

    def close(self) -> None:
        self._reduction.close()

    def expected(self) -> Iterator[tuple[Tensor, Pattern, int]]:
        yield self.output, total(self.comm.world_size, self.buffer.dtype, self.buffer.device), 0


def _shared_reduction(comm: Communicator, like: Tensor) -> Reduction:
    """The ordered sum in memory that all ranks see. Raises UserError where they see none."""
    window = comm.open_window(like.nbytes)
    if isinstance(window, NoWindow):
        raise UserError(f"the ranks share no memory: {window.reason}")
    return SharedReduction(comm, window, window.parts[comm.rank].view(like.dtype), kernels_for(comm.device))


class _OutOfPlace(Operation):
    """What operations have in common that read one buffer and write another."""

    @staticmethod
    def bus_factor(world_size: int) -> float:
        return _ring_share(world_size)

    @staticmethod
    def steps(world_size: int) -> int:
        return world_size - 1

    def refill(self) -> None:
        sent_by(self.comm.rank, self.buffer.device).fill(self.buffer)
        self.output.fill_(_UNWRITTEN)

    @property
    def _part(self) -> int:
        return self.buffer.numel() // self.comm.world_size


class ReduceScatter(_OutOfPlace):
    def refill(self) -> None:
        summand(self.comm.world_size, self.comm.rank, self.buffer.dtype, self.buffer.device).fill(self.buffer)
        self.output.fill_(_UNWRITTEN)

    def run(self) -> None:
        self.comm.reduce_scatter_(self.output[: self._part], self.buffer).wait()

    def expected(self) -> Iterator[tuple[Tensor, Pattern, int]]:
        sums = total(self.comm.world_size, self.buffer.dtype, self.buffer.device)
        yield self.output[: self._part], sums, self.comm.rank * self._part


class AllGather(_OutOfPlace):
    def run(self) -> None:
        self.comm.all_gather_(self.output, self.buffer[: self._part]).wait()

    def expected(self) -> Iterator[tuple[Tensor, Pattern, int]]:
        for rank, piece in enumerate(torch.split(self.output, self._part)):
            yield piece, sent_by(rank, piece.device), 0


class AllToAll(_OutOfPlace):
    def run(self) -> None:
        self.comm.all_to_all_(self.output, self.buffer).wait()

    def expected(self) -> Iterator[tuple[Tensor, Pattern, int]]:
        for rank, piece in enumerate(torch.split(self.output, self._part)):
            yield piece, sent_by(rank, piece.device), self.comm.rank * self._part


class Broadcast(Operation):
    """From rank 0, in place."""

    in_parts = False

    @staticmethod
    def bus_factor(world_size: int) -> float:
        return 1.0

    @staticmethod
    def steps(world_size: int) -> int:
        return world_size - 1

    def refill(self) -> None:
        if self.comm.rank == 0:
            sent_by(0, self.buffer.device).fill(self.buffer)
        else:
            self.buffer.fill_(_UNWRITTEN)

    def run(self) -> None:
        self.comm.broadcast_(self.buffer).wait()

    def expected(self) -> Iterator[tuple[Tensor, Pattern, int]]:
        yield self.buffer, sent_by(0, self.buffer.device), 0


OPERATIONS: dict[str, type[Operation]] = {
    "all_reduce": AllReduce,
    "reduce_scatter": ReduceScatter,
    "all_gather": AllGather,
    "all_to_all": AllToAll,
    "broadcast": Broadcast,
}


def all_cases(dtypes: Sequence[str]) -> list[Case]:
    """All-reduce by every reduction there is, then the engine's other operations; ``dtypes`` are those of sums."""
    return [
        *(Case("all_reduce", algorithm, dtype) for dtype in dtypes for algorithm in (*REDUCTIONS, SHARED)),
        *(Case("reduce_scatter", "engine", dtype) for dtype in dtypes),
        *(Case(operation, "engine", MOVED_DTYPE) for operation in ("all_gather", "all_to_all", "broadcast")),
    ]


def prepare(case: Case, comm: Communicator, buffer: Tensor, output: Tensor) -> Operation:
    """The operation of ``case`` on these buffers; they are of its dtype and of a length that it divides."""
    if case.operation == "all_reduce":
        return AllReduce(comm, buffer, output, case.algorithm)
    return OPERATIONS[case.operation](comm, buffer, output)
