"""`hpctrain bench comm`: time and bandwidth of each operation by size, on the ranks of a job.

In a round every operation runs one block at every size, in random order, the same on all ranks: the machine's pace
drifts, and so every figure sees all of it. A block begins with a run whose result is compared, element by element,
with the exact one; a wrong element ends the job. Then come runs that warm up, and those that are timed, one after
another, each waited for. Its time is that of the slowest rank.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from hpctrain.bench.blocks import settle
from hpctrain.bench.comm.operations import Case, Operation, prepare
from hpctrain.bench.comm.pattern import Wrong
from hpctrain.bench.comm.sizes import tell
from hpctrain.comm.agree import raise_together
from hpctrain.comm.base import Communicator
from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.clock import synchronise

#: runs of a block that are not timed, the verified one aside
WARMUP_RUNS = 2
#: how long the timed runs of a block should take together, and how many there are at the most
BLOCK_S = 0.05
MAX_RUNS = 1000
#: what a rank may take of its share of the free memory
_MEMORY_SHARE = 0.8
#: whole buffers of a rank: what is sent, what is received, and what a reduction keeps
_BUFFERS = 3


@dataclass(frozen=True, slots=True)
class Cell:
    """A case at the size ``asked_bytes``; its buffers are ``elements`` long, rounded up to what it divides."""

    case: Case
    asked_bytes: int
    elements: int

    @property
    def size_bytes(self) -> int:
        return self.elements * self.case.torch_dtype.itemsize


@dataclass
class Samples:
    """Seconds of one run, a figure a round; each is the mean over the ``runs`` of a block on its slowest rank."""

    runs: int
    time_s: list[float] = field(default_factory=list)


class Bench:
    """The buffers of this rank, cut for each cell, and the clock. All that it does is collective.

    ``tick`` is called before everything that may take long. Raises UserError where memory is too small.
    """

    def __init__(self, comm: Communicator, max_bytes: int, tick: Callable[[], None]) -> None:
        self.comm = comm
        self._tick = tick
        raise_together(comm, _too_large(comm, max_bytes))
        self._memory = [torch.zeros(max_bytes, dtype=torch.uint8, device=comm.device) for _ in range(2)]

    @contextmanager
    def opened(self, cell: Cell) -> Iterator[Operation]:
        """The operation of ``cell``, refilled; closed after a good end. UserError where this job cannot do it."""
        buffer, output = (self._cut(memory, cell) for memory in self._memory)
        operation = prepare(cell.case, self.comm, buffer, output)
        operation.refill()
        yield operation
        operation.close()

    def try_out(self, cell: Cell) -> int | str:
        """Runs a block of ``cell`` is to have, or why this job cannot do it. Raises MachineError as ``block`` does."""
        self._tick()
        refusal, wrong, elapsed_s = "", None, 0.0
        try:
            with self.opened(cell) as operation:
                settle(self.comm)
                operation.run()
                wrong = operation.find_wrong()
                settle(self.comm)
                elapsed_s = self._clocked(operation, 1)
        except UserError as error:
            refusal = str(error)
        rows = self.comm.all_gather_object([refusal, _describe(wrong), elapsed_s])
        refusals: list[str] = [row[0] for row in rows if row[0]]
        if refusals:
            return refusals[0]
        self._raise_if_wrong(cell, [row[1] for row in rows])
        slowest_s: float = max(row[2] for row in rows)
        return min(MAX_RUNS, max(1, round(BLOCK_S / slowest_s)))

    def block(self, cell: Cell, runs: int) -> float:
        """Seconds of one run, the mean of ``runs`` on the slowest rank.

        Raises MachineError, on every rank, when a result is wrong: it names operation, size, rank and element.
        """
        self._tick()
        with self.opened(cell) as operation:
            settle(self.comm)
            operation.run()
            wrong = operation.find_wrong()
            self._clocked(operation, WARMUP_RUNS)
            elapsed_s = sum(self._portion(operation, portion) for portion in _portions(runs, operation.most_runs()))
        rows = self.comm.all_gather_object([_describe(wrong), elapsed_s])
        self._raise_if_wrong(cell, [row[0] for row in rows])
        return float(max(row[1] for row in rows)) / runs

    def _portion(self, operation: Operation, runs: int) -> float:
        self._tick()
        operation.refill()
        settle(self.comm)
        return self._clocked(operation, runs)

    def _clocked(self, operation: Operation, runs: int) -> float:
        synchronise(self.comm.device)
        started_s = time.perf_counter()
        for _ in range(runs):
            operation.run()
        synchronise(self.comm.device)
        return time.perf_counter() - started_s

    def _cut(self, memory: Tensor, cell: Cell) -> Tensor:
        return memory[: cell.size_bytes].view(cell.case.torch_dtype)

    def _raise_if_wrong(self, cell: Cell, described: Sequence[str]) -> None:
        faults = [f"rank {rank} has {text}" for rank, text in enumerate(described) if text]
        if faults:
            more = f", and {len(faults) - 1} more ranks are wrong" if len(faults) > 1 else ""
            raise MachineError(
                f"{cell.case} is wrong at {tell(cell.size_bytes)}: {faults[0]}{more}; no figures are given"
            )


def _portions(runs: int, most: int | None) -> list[int]:
    """``runs`` as portions of at most ``most``."""
    most = most or runs
    return [min(most, runs - begun) for begun in range(0, runs, most)]


def _describe(wrong: Wrong | None) -> str:
    if wrong is None:
        return ""
    return f"{wrong.count} wrong elements, at {wrong.index} it is {wrong.found:g} instead of {wrong.expected:g}"


def _too_large(comm: Communicator, max_bytes: int) -> UserError | None:
    if comm.device.type == "cuda":
        free, ranks = torch.cuda.mem_get_info(comm.device)[0], 1
    else:
        free, ranks = psutil.virtual_memory().available, comm.topology.local_size
    # `central` gathers the buffers of all ranks on rank 0.
    needed = (_BUFFERS * ranks + comm.world_size) * max_bytes
    if needed <= _MEMORY_SHARE * free:
        return None
    return UserError(
        f"messages of {tell(max_bytes)} need {needed / 2**30:.1f} GiB on host {comm.topology.host}, "
        f"which has {free / 2**30:.1f} GiB free: lower --max-size"
    )


def cells_of(cases: Sequence[Case], sizes: Sequence[int], world_size: int) -> list[Cell]:
    """Each case at each of ``sizes`` (bytes) that is large enough for it."""
    pairs = [(case, size, case.elements(size, world_size)) for case in cases for size in sizes]
    return [Cell(case, size, elements) for case, size, elements in pairs if elements is not None]


def run(
    bench: Bench, cells: Sequence[Cell], *, rounds: int, seed: int, on_round: Callable[[int], None]
) -> tuple[dict[Cell, Samples], dict[Case, str]]:
    """Samples of all cells, and why some cases are not among them. Collective.

    The order within rounds follows from ``seed``, equal on all ranks. Raises MachineError for a wrong result.
    """
    samples: dict[Cell, Samples] = {}
    refused: dict[Case, str] = {}
    for cell in cells:
        if cell.case in refused:
            continue
        outcome = bench.try_out(cell)
        if isinstance(outcome, str):
            refused[cell.case] = outcome
        else:
            samples[cell] = Samples(outcome)
    generator = random.Random(seed)
    for number in range(rounds):
        for cell in generator.sample(list(samples), len(samples)):
            samples[cell].time_s.append(bench.block(cell, samples[cell].runs))
        on_round(number + 1)
    return samples, refused
