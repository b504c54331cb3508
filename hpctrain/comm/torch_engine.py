"""The torch.distributed engine (NCCL on GPUs, Gloo on CPUs), and the one door to that package.

The side channel's store is opened here too, so that ``torch.distributed`` is imported in one file.
"""

from __future__ import annotations

import datetime
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator, Op, Work
from hpctrain.comm.checks import as_bytes, faults, require_ascending, require_output, require_parts, require_reducible
from hpctrain.comm.process import end_process
from hpctrain.errors import UserError
from hpctrain.topology.probe import Probe
from hpctrain.topology.ranks import Topology
from hpctrain.topology.rendezvous import rendezvous

NAME = "torch"
#: torch's own names: how many operations its flight recorder keeps, and the beginning of the names of its files
_RECORDER_SIZE, _RECORDER_FILE = "TORCH_NCCL_TRACE_BUFFER_SIZE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE"


def probe() -> Probe:
    """Which of torch's backends were compiled in."""
    import torch.distributed as dist

    versions = {"torch": str(torch.__version__)}
    if not dist.is_available():
        remedy = "install a torch with torch.distributed"
        return Probe(NAME, ok=False, versions=versions, reason="torch was built without distributed", remedy=remedy)
    parts = {"gloo": dist.is_gloo_available, "NCCL": dist.is_nccl_available, "MPI": dist.is_mpi_available}
    return Probe(NAME, ok=True, versions=versions, built_with=tuple(part for part, built in parts.items() if built()))


def open_store(host: str, port: int, *, serve: bool, timeout_s: float) -> Any:
    """A client of the TCP store at ``host:port``, with the server in this process when ``serve``.

    Port 0 lets the server pick one, then found as ``.port``. The server's thread runs without the interpreter lock.
    """
    import torch.distributed as dist

    limit = datetime.timedelta(seconds=timeout_s)
    return dist.TCPStore(host, port, is_master=serve, wait_for_workers=False, timeout=limit)  # type: ignore[attr-defined]


def boot(topology: Topology, device: torch.device, timeout_s: float) -> Communicator:
    """Form the process group of all ranks, meeting where torchrun says or where ``rendezvous`` finds.

    Collectives fail by themselves after ``timeout_s``. Raises UserError when no meeting point is known.
    """
    import torch.distributed as dist

    # Torch's optimizers import this module, whose default arguments hold the group there is by then: its threads
    # would outlive close() and meet the end of the interpreter.
    from torch.distributed.nn import functional  # noqa: F401

    backend = "nccl" if device.type == "cuda" else "gloo"
    group: dict[str, Any] = {"backend": backend, "timeout": datetime.timedelta(seconds=timeout_s)}
    if backend == "nccl":
        group["device_id"] = device
    if topology.launcher != "torchrun":
        group |= {"store": meet(topology, timeout_s), "rank": topology.rank, "world_size": topology.world_size}
    with faults(topology, NAME, "start", RuntimeError, ValueError):
        dist.init_process_group(**group)
    return TorchCommunicator(topology, device, None)


def wrap_released(model: torch.nn.Module, *, fp16: bool) -> torch.nn.Module:
    """``model`` in DistributedDataParallel over the world's group, as it comes: a peer to be measured against.

    ``fp16`` adds the hook that sends gradients in that format.
    """
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
    from torch.nn.parallel import DistributedDataParallel

    wrapped = DistributedDataParallel(model)
    if fp16:
        wrapped.register_comm_hook(None, fp16_compress_hook)
    return wrapped


def meet(topology: Topology, timeout_s: float) -> Any:
    """A store of this job that all ranks open, where ``rendezvous`` says. Collective: rank 0 serves it as long as it
    keeps it. Raises UserError when no meeting point is known, or when its port is taken."""
    import torch.distributed as dist

    if topology.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    point = rendezvous(os.environ, topology)
    with faults(topology, NAME, f"rendezvous at {point.host}:{point.port}", RuntimeError):
        try:
            store = open_store(point.host, point.port, serve=topology.rank == 0, timeout_s=timeout_s)
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {point.port} of {topology.host}, where the ranks of this job meet, is taken by another program: "
                "export MASTER_PORT with a free one"
            ) from error
    # A rank that reached another job's store by accident finds none of its keys there.
    return dist.PrefixStore(point.job, store)  # type: ignore[attr-defined]


class _TorchWork:
    def __init__(self, comm: TorchCommunicator, operation: str, start: Callable[[], Any]) -> None:
        self._comm, self._operation = comm, operation
        with comm.faults(operation), warnings.catch_warnings():
            # 2.13 renames reduce_scatter_tensor and all_gather_into_tensor, which 2.6 knows only by these names.
            warnings.simplefilter("ignore", FutureWarning)
            self._work: Any = start()

    def wait(self) -> None:
        if self._work is None:
            return
        work, self._work = self._work, None
        with self._comm.faults(self._operation):
            work.wait()


class TorchCommunicator(Communicator):
    """A process group of torch.distributed; ``group`` None is the world's."""

    name = NAME
    reducible = (*Communicator.reducible, torch.bfloat16)

    def __init__(self, topology: Topology, device: torch.device, group: Any) -> None:
        super().__init__(topology, device)
        import torch.distributed as dist

        self._dist, self._group = dist, group
        self._world_ranks: list[int] = dist.get_process_group_ranks(group)

    def faults(self, operation: str) -> Any:
        return faults(self.topology, NAME, operation, RuntimeError)

    def all_reduce_(self, buffer: Tensor, op: Op = "sum") -> Work:
        require_reducible(NAME, buffer, self.reducible)
        native = {"sum": self._dist.ReduceOp.SUM, "min": self._dist.ReduceOp.MIN, "max": self._dist.ReduceOp.MAX}[op]
        return self._start("all_reduce", lambda: self._dist.all_reduce(buffer, native, self._group, async_op=True))

    def reduce_scatter_(self, output: Tensor, buffer: Tensor) -> Work:
        require_reducible(NAME, buffer, self.reducible)
        require_parts(buffer, output, self.world_size)
        return self._start(
            "reduce_scatter",
            lambda: self._dist.reduce_scatter_tensor(output, buffer, group=self._group, async_op=True),
        )

    def all_gather_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, self.world_size)
        received, sent = as_bytes(output), as_bytes(buffer)
        return self._start(
            "all_gather",
            lambda: self._dist.all_gather_into_tensor(received, sent, group=self._group, async_op=True),
        )

    def all_to_all_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, 1)
        received, sent = as_bytes(output), as_bytes(buffer)
        return self._start(
            "all_to_all",
            lambda: self._dist.all_to_all_single(received, sent, group=self._group, async_op=True),
        )

    def gather_(self, output: Tensor | None, buffer: Tensor, root: int = 0) -> Work:
        sent, world_root, parts = as_bytes(buffer), self._world_ranks[root], None
        if self.rank == root:
            whole = as_bytes(require_output(output, buffer, self.world_size))
            parts = list(whole.tensor_split(self.world_size))
        return self._start(
            "gather", lambda: self._dist.gather(sent, parts, world_root, group=self._group, async_op=True)
        )

    def broadcast_(self, buffer: Tensor, root: int = 0) -> Work:
        moved, world_root = as_bytes(buffer), self._world_ranks[root]
        return self._start(
            "broadcast", lambda: self._dist.broadcast(moved, world_root, group=self._group, async_op=True)
        )

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        require_ascending(ranks)
        with self.faults("split"):
            group = self._dist.new_group([self._world_ranks[rank] for rank in ranks])
        if self.rank not in ranks:
            return None
        return TorchCommunicator(self.topology.within(ranks), self.device, group)

    def barrier(self) -> None:
        with self.faults("barrier"):
            self._dist.barrier(self._group)

    def abort(self, code: int) -> None:
        # torchrun, mpirun and srun --kill-on-bad-exit end the job when a rank leaves with an error.
        end_process(code)

    def close(self) -> None:
        self._dist.destroy_process_group(self._group)

    def dump_trace(self) -> Path | None:
        """NCCL's flight recorder, which the variables above switch on; under the name torch itself would give the file,
        so that ``torchfrtrace`` reads it. Torch writes it at the group's own time limit, which is never reached.

        Not yet run on a GPU. Gloo has no recorder.
        """
        if self.device.type != "cuda" or int(os.environ.get(_RECORDER_SIZE, 0)) == 0:
            return None
        path = Path(f"{os.environ.get(_RECORDER_FILE, '/tmp/nccl_trace_rank_')}{self._world_ranks[self.rank]}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(torch._C._distributed_c10d._dump_nccl_trace())  # type: ignore[attr-defined]
        return path

    def versions(self) -> dict[str, str]:
        found = {"torch": torch.__version__, "torch_backend": self._dist.get_backend(self._group)}
        if self.device.type == "cuda":
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        return found

    def _start(self, operation: str, start: Callable[[], Any]) -> Work:
        return _TorchWork(self, operation, start)
