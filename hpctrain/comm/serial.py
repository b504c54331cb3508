"""The engine of one rank: every collective over a group of one is a copy or nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator, FinishedWork, Op, Work
from hpctrain.comm.checks import require_ascending, require_output, require_parts, require_same_world
from hpctrain.comm.process import end_process
from hpctrain.topology.probe import Probe
from hpctrain.topology.ranks import Topology

NAME = "serial"


def probe() -> Probe:
    """Always well: it needs torch alone."""
    return Probe(NAME, ok=True, versions={"torch": torch.__version__})


def boot(topology: Topology, device: torch.device, timeout_s: float) -> Communicator:
    """The communicator of a job of one rank; UserError under a launcher that started several."""
    require_same_world(topology, NAME, 0, 1, "start it with plain python, or set comm.engine=auto")
    return SerialCommunicator(topology, device)


class SerialCommunicator(Communicator):
    """A group of one."""

    name = NAME

    def all_reduce_(self, buffer: Tensor, op: Op = "sum") -> Work:
        return FinishedWork()

    def reduce_scatter_(self, output: Tensor, buffer: Tensor) -> Work:
        return self._copy(output, buffer)

    def all_gather_(self, output: Tensor, buffer: Tensor) -> Work:
        return self._copy(output, buffer)

    def all_to_all_(self, output: Tensor, buffer: Tensor) -> Work:
        return self._copy(output, buffer)

    def gather_(self, output: Tensor | None, buffer: Tensor, root: int = 0) -> Work:
        return self._copy(require_output(output, buffer, 1), buffer)

    def broadcast_(self, buffer: Tensor, root: int = 0) -> Work:
        return FinishedWork()

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        require_ascending(ranks)
        return SerialCommunicator(self.topology, self.device) if self.rank in ranks else None

    def barrier(self) -> None:
        return

    def abort(self, code: int) -> None:
        end_process(code)

    def close(self) -> None:
        return

    def versions(self) -> dict[str, str]:
        return {"torch": torch.__version__}

    def _copy(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, 1)
        output.copy_(buffer)
        return FinishedWork()
