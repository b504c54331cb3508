"""How one buffer is summed over the ranks: the contract, and the engine's own all-reduce.

A reduction belongs to one buffer and keeps what it needs for it, so a step allocates nothing. It knows nothing
of parameters, and takes no mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from hpctrain.comm.base import Communicator, Work


class Reduction(ABC):
    """Sum ``buffer`` [n] over all ranks; the sum is then in ``parts``.

    Every rank calls ``start`` for all buffers of a step in one order, then ``proceed`` for all in that order,
    then ``wait``: so all ranks hand the same sequence of collectives to the engine. Around that, ``begin`` comes
    before the buffer is written and ``end`` after the sum was read.
    """

    def __init__(self, comm: Communicator, buffer: Tensor) -> None:
        self.comm = comm
        self.buffer = buffer

    @property
    def parts(self) -> Sequence[Tensor]:
        """What the sum is the concatenation of, between ``wait`` and ``end``."""
        return (self.buffer,)

    @property
    def share(self) -> slice:
        """This rank's of as many equal pieces of the buffer as there are ranks; a rest belongs to the last."""
        step, rank = self.buffer.numel() // self.comm.world_size, self.comm.rank
        return slice(rank * step, self.buffer.numel() if rank == self.comm.world_size - 1 else (rank + 1) * step)

    def begin(self) -> None:  # noqa: B027 - a buffer of one's own may be written at any time
        """Return when the buffer may be written again."""

    @abstractmethod
    def start(self) -> None:
        """Launch the first collective; returns at once."""

    @abstractmethod
    def proceed(self) -> None:
        """Launch what depends on the first collective, if anything does."""

    @abstractmethod
    def wait(self) -> None:
        """Return when ``buffer`` holds the sum. Raises MachineError when the engine reports a failure."""

    def poll(self) -> None:  # noqa: B027 - most have to keep to an order
        """Get on where nobody has to be waited for; called now and then between ``start`` and ``proceed``."""

    def end(self) -> None:  # noqa: B027 - see ``begin``
        """Take note that the sum was read."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what it holds beside its buffers, such as a window. Collective."""


class EngineReduction(Reduction):
    """The engine's all-reduce: its own algorithm and order of summation."""

    _work: Work

    def start(self) -> None:
        self._work = self.comm.all_reduce_(self.buffer)

    def proceed(self) -> None:
        return

    def wait(self) -> None:
        self._work.wait()
