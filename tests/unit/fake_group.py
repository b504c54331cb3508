"""A group of ranks as threads of one process: the communicator's contract over shared memory, and stricter.

Each collective takes effect only when it was waited for, the buffers it is to fill hold NaN until then, and
ranks that call different collectives, or with different sizes, fail instead of hanging.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator, Op, Work
from hpctrain.topology.ranks import Topology, place

TIMEOUT_S = 20.0
T = TypeVar("T")


class PeerFailed(Exception):
    """Another rank raised, so this one would wait for ever."""


@dataclass
class _Meeting:
    """One collective: what each rank brought, in rank order once all have come."""

    kind: str
    size: int
    brought: dict[int, Tensor] = field(default_factory=dict)
    complete: threading.Event = field(default_factory=threading.Event)


class Group:
    """What the ranks of one group share."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.log: list[list[tuple[str, int]]] = [[] for _ in range(world_size)]
        self._meetings: list[_Meeting] = []
        self._lock = threading.Lock()
        self._splits: dict[tuple[int, ...], Group] = {}
        self.failed = False

    def meet(self, rank: int, kind: str, brought: Tensor) -> _Meeting:
        with self._lock:
            turn = len(self.log[rank])
            self.log[rank].append((kind, brought.numel()))
            if turn == len(self._meetings):
                self._meetings.append(_Meeting(kind, brought.numel()))
            meeting = self._meetings[turn]
            assert (meeting.kind, meeting.size) == (kind, brought.numel()), (
                f"rank {rank} calls {kind} of {brought.numel()} as number {turn}, "
                f"others {meeting.kind} of {meeting.size}"
            )
            meeting.brought[rank] = brought.clone()
            if self.failed or len(meeting.brought) == self.world_size:
                meeting.complete.set()
            return meeting

    def fail(self) -> None:
        with self._lock:
            self.failed = True
            for meeting in self._meetings:
                meeting.complete.set()

    def split(self, ranks: tuple[int, ...]) -> Group:
        with self._lock:
            return self._splits.setdefault(ranks, Group(len(ranks)))


class _FakeWork:
    def __init__(self, group: Group, meeting: _Meeting, deliver: Callable[[list[Tensor]], object]) -> None:
        self._group = group
        self._meeting = meeting
        self._deliver = deliver

    def wait(self) -> None:
        assert self._meeting.complete.wait(TIMEOUT_S), f"not all ranks came to {self._meeting.kind}"
        if len(self._meeting.brought) < self._group.world_size:
            raise PeerFailed
        self._deliver([self._meeting.brought[rank] for rank in range(self._group.world_size)])


def _poison(buffer: Tensor) -> None:
    buffer.fill_(float("nan") if buffer.is_floating_point() else 0)


def _reduced(parts: Sequence[Tensor], op: Op) -> Tensor:
    stacked = torch.stack(list(parts))
    if op == "min":
        return stacked.amin(0)
    return stacked.amax(0) if op == "max" else sum(parts[1:], start=parts[0].clone())


class FakeCommunicator(Communicator):
    """One rank of a ``Group``."""

    name = "fake"

    def __init__(self, group: Group, rank: int, hosts: Sequence[str] | None = None) -> None:
        topology = Topology(rank=rank, world_size=group.world_size, host=f"host{rank}")
        super().__init__(place(topology, hosts) if hosts else topology, torch.device("cpu"))
        self.group = group

    def _launch(self, kind: str, brought: Tensor, output: Tensor, result: Callable[[list[Tensor]], Tensor]) -> Work:
        meeting = self.group.meet(self.rank, kind, brought)
        _poison(output)
        return _FakeWork(self.group, meeting, lambda parts: output.copy_(result(parts)))

    def all_reduce_(self, buffer: Tensor, op: Op = "sum") -> Work:
        return self._launch(f"all_reduce {op}", buffer, buffer, lambda parts: _reduced(parts, op))

    def reduce_scatter_(self, output: Tensor, buffer: Tensor) -> Work:
        return self._launch("reduce_scatter", buffer, output, lambda parts: self._mine(_reduced(parts, "sum")))

    def all_gather_(self, output: Tensor, buffer: Tensor) -> Work:
        assert output.numel() == self.world_size * buffer.numel()
        return self._launch("all_gather", buffer, output, torch.cat)

    def all_to_all_(self, output: Tensor, buffer: Tensor) -> Work:
        assert output.numel() == buffer.numel()
        return self._launch("all_to_all", buffer, output, lambda parts: torch.cat([self._mine(p) for p in parts]))

    def gather_(self, output: Tensor | None, buffer: Tensor, root: int = 0) -> Work:
        kept = torch.empty(0)
        if self.rank == root:
            assert output is not None and output.numel() == self.world_size * buffer.numel()
            kept = output
        return self._launch(f"gather {root}", buffer, kept, lambda parts: torch.cat(parts)[: kept.numel()])

    def broadcast_(self, buffer: Tensor, root: int = 0) -> Work:
        return self._launch(f"broadcast {root}", buffer, buffer, lambda parts: parts[root])

    def _mine(self, whole: Tensor) -> Tensor:
        return whole.view(self.world_size, -1)[self.rank]

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        group = self.group.split(tuple(ranks))
        return FakeCommunicator(group, list(ranks).index(self.rank)) if self.rank in ranks else None

    def barrier(self) -> None:
        self.all_reduce_(torch.zeros(1)).wait()

    def abort(self, code: int) -> None:
        raise SystemExit(code)

    def close(self) -> None:
        return


def run_group(world_size: int, work: Callable[[FakeCommunicator], T], hosts: Sequence[str] | None = None) -> list[T]:
    """What ``work`` returns on each rank, in rank order; raises what the lowest failing rank raised.

    ``hosts`` names the host of each rank and places the ranks; without it each has a host of its own, unplaced.
    """
    group = Group(world_size)

    def run(rank: int) -> T:
        try:
            return work(FakeCommunicator(group, rank, hosts))
        except BaseException:
            group.fail()
            raise

    with ThreadPoolExecutor(world_size) as pool:
        futures = [pool.submit(run, rank) for rank in range(world_size)]
        errors = [future.exception() for future in futures]
    first = next((error for error in errors if error and not isinstance(error, PeerFailed)), None)
    if first:
        raise first
    return [future.result() for future in futures]
