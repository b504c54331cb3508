"""The contract of a communicator: it moves buffers between ranks, and knows nothing else.

Names follow MPI. A trailing underscore means in place (or into the first argument); ``_object`` means small
values, encoded as JSON, never once a step. Buffers are contiguous one-dimensional torch tensors on the
engine's device. There is no mean and no hidden copy: scaling belongs to ``hpctrain.gradients``.

Every engine moves any dtype and reduces float16, float32, float64, int32 and int64; another dtype, such as
bfloat16, is reduced where the engine can and is a UserError where it cannot.

Every rank calls the same operations in the same order; an asynchronous operation is over when its ``Work``
was waited for, and until then its buffers belong to the engine.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from hpctrain.topology.ranks import Topology

Op = Literal["sum", "min", "max"]


class Work(Protocol):
    """A communication under way."""

    def wait(self) -> None:
        """Block until the operation is over (on a GPU: until the current stream may use its result).

        Raises MachineError when the engine reports a failure.
        """


class FinishedWork:
    """The work of an operation that was over when it returned."""

    def wait(self) -> None:
        return


class Window(Protocol):
    """Memory of one host that all ranks of a group see: each writes a part of its own and reads the others'.

    A round is: write, ``post``, ``wait`` for the others' same number of posts, read. A rank that writes its part
    again must know that the others have read it: from a later round's ``wait``.
    """

    #: one a rank, uint8 [nbytes], in rank order: mine may be written, the others' only read
    parts: list[Tensor]
    #: how often this rank has posted
    posted: int

    def post(self) -> None:
        """Let the others see all that I have written."""

    def reached(self, count: int) -> bool:
        """Whether every rank has posted ``count`` times or more."""

    def wait(self, count: int) -> None:
        """Return when every rank has posted ``count`` times or more. It may be called where ranks outnumber cores.

        Raises MachineError, naming rank and host, when one that has not will never do: its process is gone.
        """

    def close(self) -> None:
        """Give the memory back, as soon as nobody holds a tensor on it."""


@dataclass(frozen=True)
class NoWindow:
    """Why the ranks of a group share no memory."""

    reason: str


class Communicator(ABC):
    """One group of ranks. ``topology`` tells this process's place in it."""

    #: name in the registry, for records and messages
    name: str
    #: what ``all_reduce_`` and ``reduce_scatter_`` can sum
    reducible: Collection[torch.dtype] = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)

    def __init__(self, topology: Topology, device: torch.device) -> None:
        self.topology = topology
        self.device = device
        self._subgroups: dict[tuple[int, ...], Communicator | None] = {}
        #: called where this rank's own work is done and it comes to wait for the others: before each exchange of small
        #: values, and by the program before other collectives outside of a step. For whoever watches over the ranks.
        self.arrive: Callable[[], None] = _nobody_watches

    @property
    def rank(self) -> int:
        return self.topology.rank

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @abstractmethod
    def all_reduce_(self, buffer: Tensor, op: Op = "sum") -> Work:
        """Reduce ``buffer`` [n] elementwise over all ranks; every rank ends with the same result."""

    @abstractmethod
    def reduce_scatter_(self, output: Tensor, buffer: Tensor) -> Work:
        """Sum ``buffer`` [world_size * n] over all ranks; rank r keeps the r-th part in ``output`` [n]."""

    @abstractmethod
    def all_gather_(self, output: Tensor, buffer: Tensor) -> Work:
        """Put rank r's ``buffer`` [n] into the r-th part of every rank's ``output`` [world_size * n]."""

    @abstractmethod
    def all_to_all_(self, output: Tensor, buffer: Tensor) -> Work:
        """Send the r-th part of ``buffer`` [world_size * n] to rank r; ``output`` holds one part from each rank."""

    @abstractmethod
    def gather_(self, output: Tensor | None, buffer: Tensor, root: int = 0) -> Work:
        """Put rank r's ``buffer`` [n] into the r-th part of rank ``root``'s ``output`` [world_size * n].

        Nothing else travels; ``output`` of the other ranks is not looked at.
        """

    @abstractmethod
    def broadcast_(self, buffer: Tensor, root: int = 0) -> Work:
        """Copy ``buffer`` [n] of rank ``root`` to every rank."""

    @abstractmethod
    def split(self, ranks: Sequence[int]) -> Communicator | None:
        """A communicator over ``ranks`` of the world, ascending, or None on a rank outside them.

        Collective over the world: every rank names the same ``ranks``. The new topology counts rank and world size
        in the group; its node part stays the job's. Raises ValueError when ``ranks`` is not ascending.
        """

    def subgroup(self, ranks: Sequence[int]) -> Communicator | None:
        """What ``split`` gives for ``ranks``, split the first time and kept from then on. Collective alike."""
        members = tuple(ranks)
        if members not in self._subgroups:
            self._subgroups[members] = self.split(members)
        return self._subgroups[members]

    def open_window(self, nbytes: int) -> Window | NoWindow:
        """A window with ``nbytes`` of memory a rank, or on all ranks why there is none: ranks on several hosts, buffers
        on a GPU, or a host that does not let processes share memory in this way.

        Collective: every rank passes the same ``nbytes``.
        """
        from hpctrain.comm.window import open_window

        return open_window(self, nbytes)

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has come here."""

    @abstractmethod
    def abort(self, code: int) -> None:
        """End the processes of all ranks as far as the engine can, this one with exit status ``code``."""

    @abstractmethod
    def close(self) -> None:
        """Give the engine's resources back. Collective; nothing may be under way."""

    def dump_trace(self) -> Path | None:
        """Write what the engine itself has recorded of its collectives to a file; None where it records nothing.

        For a job that hangs, whose end it may delay: it waits for no other rank. Raises RuntimeError or OSError.
        """
        return None

    def versions(self) -> dict[str, str]:
        """What the engine runs on, for records: library name to version."""
        return {}

    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, in rank order. ``value`` must survive JSON."""
        self.arrive()
        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        sizes = torch.zeros(self.world_size, dtype=torch.int64, device=self.device)
        mine = torch.tensor([payload.numel()], dtype=torch.int64, device=self.device)
        self.all_gather_(sizes, mine).wait()
        longest = int(sizes.max())
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: payload.numel()] = payload
        gathered = torch.empty(self.world_size * longest, dtype=torch.uint8, device=self.device)
        self.all_gather_(gathered, padded).wait()
        rows = gathered.cpu().view(self.world_size, longest)
        return [json.loads(bytes(row[:size].numpy())) for row, size in zip(rows, sizes.tolist(), strict=True)]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The value of rank ``root``, on every rank; what the others pass is ignored."""
        self.arrive()
        encoded = json.dumps(value).encode() if self.rank == root else b""
        size = torch.tensor([len(encoded)], dtype=torch.int64, device=self.device)
        self.broadcast_(size, root).wait()
        buffer = torch.zeros(int(size), dtype=torch.uint8, device=self.device)
        if self.rank == root:
            buffer.copy_(torch.frombuffer(bytearray(encoded), dtype=torch.uint8))
        self.broadcast_(buffer, root).wait()
        return json.loads(bytes(buffer.cpu().numpy()))


def _nobody_watches() -> None:
    return
