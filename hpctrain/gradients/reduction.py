"""How one buffer is summed over the ranks: the contract, and the engine's own all-reduce.

A reduction belongs to one buffer and keeps what it needs for it, so a step allocates nothing. It knows nothing
of parameters, and takes no mean.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from hpctrain.comm.base import Communicator, Work


class Reduction(ABC):
    """Sum ``buffer`` [n] over all ranks; the sum is then in ``parts``.

    Every rank calls ``start`` for all buffers of a step in one order, then ``complete`` for all in that order: so all
    ranks hand the same sequence of collectives to the engine. Around that, ``begin`` comes before the buffer is
    written and ``end`` after the sum was read.
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
    def proceed(self) -> bool:
        """Launch what depends on the collective before, if anything does; whether more is to come after that."""

    @abstractmethod
    def wait(self) -> None:
        """Return when ``buffer`` holds the sum. Raises MachineError when the engine reports a failure."""

    def poll(self) -> None:  # noqa: B027 - most have to keep to an order
        """Get on where nobody has to be waited for; called now and then between ``start`` and ``proceed``."""

    def end(self) -> None:  # noqa: B027 - see ``begin``
        """Take note that the sum was read."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give back what it holds beside its buffers, such as a window. Collective."""


class StagedReduction(Reduction):
    """One collective after another, each launched when the one before is over."""

    _work: Work
    _launched = 0

    @abstractmethod
    def stages(self) -> Sequence[Callable[[], Work]]:
        """What launches the collectives, in order; the same number on all ranks, at least one."""

    def start(self) -> None:
        self._stages = self.stages()
        self._launched = 1
        self._work = self._stages[0]()

    def proceed(self) -> bool:
        if self._launched < len(self._stages):
            self._work.wait()
            self._work = self._stages[self._launched]()
            self._launched += 1
        return self._launched < len(self._stages)

    def wait(self) -> None:
        self._work.wait()


class EngineReduction(StagedReduction):
    """The engine's all-reduce: its own algorithm and order of summation."""

    def stages(self) -> Sequence[Callable[[], Work]]:
        return [lambda: self.comm.all_reduce_(self.buffer)]


def complete(reductions: Sequence[Reduction]) -> None:
    """Launch all that follows the first collectives of ``reductions``, which all were started.

    In rounds over all of them: a collective of one is under way while the next are launched.
    """
    while reductions:
        reductions = [reduction for reduction in reductions if reduction.proceed()]


def reduce_(reduction: Reduction) -> None:
    """One reduction from start to end, when there is nothing else to do."""
    reduction.start()
    complete([reduction])
    reduction.wait()
