"""The MPI engine: mpi4py on host buffers, and on GPUs CuPy's NCCL started over it.

One thread makes every MPI call, blocking and in the order of the program, so that collectives overlap with
compute (mpi4py gives the interpreter lock back meanwhile) and MPI need not be thread-safe beyond that.
"""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpctrain.comm import open_mpi
from hpctrain.comm.base import Communicator, Op, Work
from hpctrain.comm.checks import (
    as_bytes,
    faults,
    require_ascending,
    require_output,
    require_parts,
    require_reducible,
    require_same_world,
)
from hpctrain.comm.process import end_process
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.probe import Probe
from hpctrain.topology.ranks import Topology

NAME = "mpi"
REMEDY = "install the extra [mpi] or mpi4py for this machine's MPI, or set comm.engine=torch"
_REMEDY_WORLD = "start it with mpirun, or srun --mpi=pmix, of the MPI that mpi4py runs on, or set comm.engine=torch"
_TYPE_NAMES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int32: "INT32_T",
    torch.int64: "INT64_T",
}
#: MPI has no half types: two bytes, with operators of our own
_HALVES = (torch.float16, torch.bfloat16)
#: Parts from this size on go straight to their ranks, all at once: Open MPI's own all-to-all and all-gather take turns
#: and leave a link between hosts idle half of the time. Small parts need fewer messages with MPI's algorithms.
DIRECT_BYTES = 1 << 16
_TAG = 1
_COMBINE: dict[str, Callable[..., Tensor]] = {"sum": torch.add, "min": torch.minimum, "max": torch.maximum}


def _import_mpi() -> Any:
    """mpi4py's module, without MPI_Init as a side effect of the import."""
    import mpi4py

    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = True
    from mpi4py import MPI

    return MPI


def probe() -> Probe:
    """Import mpi4py with its MPI library, without starting it."""
    try:
        import mpi4py

        mpi = _import_mpi()
    except ModuleNotFoundError as error:
        return Probe(NAME, ok=False, reason=f"{error.name} is not installed", remedy=REMEDY)
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        return Probe(NAME, ok=False, reason=f"mpi4py finds no MPI library: {first_line}", remedy=REMEDY)
    library = mpi.Get_library_version().split(",")[0].splitlines()[0].strip("\0 ")
    from hpctrain.comm.cupy_nccl import has_nccl

    built_with = ("MPI", "NCCL") if has_nccl() else ("MPI",)
    return Probe(NAME, ok=True, versions={"mpi4py": mpi4py.__version__, "mpi": library}, built_with=built_with)


def start_mpi() -> Any:
    """mpi4py's module with MPI running; it ends with this process, whoever else uses it in between.

    Raises MachineError with MPI's own number where it does not start.
    """
    mpi = _import_mpi()
    if mpi.Is_initialized():
        return mpi
    # By way of ctypes, which lets go of the interpreter meanwhile. mpi4py's own call holds it until all ranks have
    # come, and with it the thread that is to end a job that waits in vain; what it does afterwards is done here.
    library, provided = ctypes.CDLL(mpi.__file__), ctypes.c_int()
    status = library.MPI_Init_thread(None, None, mpi.THREAD_MULTIPLE, ctypes.byref(provided))
    if status != mpi.SUCCESS:
        raise MachineError(f"MPI does not start: MPI_Init_thread returned {status}")
    for world in (mpi.COMM_SELF, mpi.COMM_WORLD):
        world.Set_errhandler(mpi.ERRORS_RETURN)
    return mpi


def boot(topology: Topology, device: torch.device, timeout_s: float) -> Communicator:
    """Join MPI's world, and on a GPU NCCL's over it.

    Raises UserError when MPI's world is not the launcher's, or when MPI may be called by the main thread only.
    """
    open_mpi.tune(topology)
    mpi = start_mpi()
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise UserError(
            "this MPI may be called by its main thread only: use one with thread support, or set comm.engine=torch"
        )
    world = mpi.COMM_WORLD
    require_same_world(topology, NAME, world.rank, world.size, _REMEDY_WORLD)
    host = MpiCommunicator(topology, torch.device("cpu"), mpi, world, Courier())
    if device.type == "cpu":
        return host
    from hpctrain.comm.cupy_nccl import start_nccl

    return start_nccl(host, device)


class Courier:
    """The one thread that calls MPI, first come first served."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_MpiWork | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="hpctrain-mpi", daemon=True).start()

    def send(self, work: _MpiWork) -> _MpiWork:
        self._jobs.put(work)
        return work

    def stop(self) -> None:
        self._jobs.put(None)

    def _run(self) -> None:
        while (work := self._jobs.get()) is not None:
            work.run()


class _MpiWork:
    def __init__(self, topology: Topology, operation: str, call: Callable[[], Any]) -> None:
        self._topology, self._operation, self._call = topology, operation, call
        self._over = threading.Event()
        self._error: Exception | None = None
        self.result: Any = None

    def run(self) -> None:
        try:
            self.result = self._call()
        except Exception as error:
            # Raised again by wait, on the thread that asked.
            self._error = error
        self._over.set()

    def wait(self) -> None:
        self._over.wait()
        if self._error is not None:
            with faults(self._topology, NAME, self._operation, RuntimeError):
                raise self._error


class MpiCommunicator(Communicator):
    """An MPI communicator moving host buffers."""

    name = NAME
    reducible = (*_TYPE_NAMES, *_HALVES)

    def __init__(self, topology: Topology, device: torch.device, mpi: Any, comm: Any, courier: Courier) -> None:
        super().__init__(topology, device)
        self._mpi, self._comm, self._courier = mpi, comm, courier
        self._half = mpi.BYTE.Create_contiguous(2).Commit()
        self._half_ops: dict[tuple[torch.dtype, str], Any] = {}

    def all_reduce_(self, buffer: Tensor, op: Op = "sum") -> Work:
        require_reducible(NAME, buffer, self.reducible)
        message, mpi_op = self._typed(buffer), self._op(buffer.dtype, op)
        return self._start("all_reduce", lambda: self._comm.Allreduce(self._mpi.IN_PLACE, message, mpi_op))

    def reduce_scatter_(self, output: Tensor, buffer: Tensor) -> Work:
        require_reducible(NAME, buffer, self.reducible)
        require_parts(buffer, output, self.world_size)
        # mpi4py reads the count of both messages as that of one part.
        (memory, _, kind), received, mpi_op = self._typed(buffer), self._typed(output), self._op(buffer.dtype, "sum")
        sent = [memory, output.numel(), kind]
        return self._start("reduce_scatter", lambda: self._comm.Reduce_scatter_block(sent, received, mpi_op))

    def all_gather_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, self.world_size)
        if buffer.nbytes >= DIRECT_BYTES:
            (part, _), parts = self._bytes(buffer), self._parts(output)
            return self._start("all_gather", lambda: self._exchange(parts, [part] * self.world_size))
        sent, received = self._bytes(buffer), self._bytes(output)
        return self._start("all_gather", lambda: self._comm.Allgather(sent, received))

    def all_to_all_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, 1)
        if buffer.nbytes >= DIRECT_BYTES * self.world_size:
            sources, parts = self._parts(buffer), self._parts(output)
            return self._start("all_to_all", lambda: self._exchange(parts, sources))
        sent, received = self._bytes(buffer), self._bytes(output)
        return self._start("all_to_all", lambda: self._comm.Alltoall(sent, received))

    def gather_(self, output: Tensor | None, buffer: Tensor, root: int = 0) -> Work:
        sent, received = self._bytes(buffer), None
        if self.rank == root:
            received = self._bytes(require_output(output, buffer, self.world_size))
        return self._start("gather", lambda: self._comm.Gather(sent, received, root))

    def broadcast_(self, buffer: Tensor, root: int = 0) -> Work:
        message = self._bytes(buffer)
        return self._start("broadcast", lambda: self._comm.Bcast(message, root))

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        require_ascending(ranks)
        color = 0 if self.rank in ranks else self._mpi.UNDEFINED
        work = self._start("split", lambda: self._comm.Split(color, self.rank))
        work.wait()
        if self.rank not in ranks:
            return None
        return MpiCommunicator(self.topology.within(ranks), self.device, self._mpi, work.result, self._courier)

    def barrier(self) -> None:
        self._start("barrier", self._comm.Barrier).wait()

    def abort(self, code: int) -> None:
        self._mpi.COMM_WORLD.Abort(code)
        end_process(code)

    def close(self) -> None:
        if self._comm == self._mpi.COMM_WORLD:
            self._start("barrier", self._comm.Barrier).wait()
            self._courier.stop()
        else:
            self._start("free", self._comm.Free).wait()

    def versions(self) -> dict[str, str]:
        return probe().versions

    def _start(self, operation: str, call: Callable[[], Any]) -> _MpiWork:
        return self._courier.send(_MpiWork(self.topology, operation, call))

    def _exchange(self, received: Sequence[Any], sent: Sequence[Any]) -> None:
        """Send ``sent[r]`` to each other rank r while ``received[r]`` comes from it; the own part is copied."""
        rank, size = self.rank, self.world_size
        # Each rank begins with its neighbour, so that no rank is everybody's first.
        ring = [(rank + distance) % size for distance in range(1, size)]
        requests = [self._comm.Irecv([received[peer], self._mpi.BYTE], peer, _TAG) for peer in reversed(ring)]
        requests += [self._comm.Isend([sent[peer], self._mpi.BYTE], peer, _TAG) for peer in ring]
        received[rank][:] = sent[rank]
        self._mpi.Request.Waitall(requests)

    def _parts(self, buffer: Tensor) -> Any:
        """``buffer`` as one row of bytes a rank; a view of the same memory."""
        return as_bytes(buffer).numpy().reshape(self.world_size, -1)

    def _bytes(self, buffer: Tensor) -> list[Any]:
        return [as_bytes(buffer).numpy(), self._mpi.BYTE]

    def _typed(self, buffer: Tensor) -> list[Any]:
        """mpi4py's (memory, count, type); a view of the same memory."""
        kind = self._half if buffer.dtype in _HALVES else getattr(self._mpi, _TYPE_NAMES[buffer.dtype])
        return [as_bytes(buffer).numpy(), buffer.numel(), kind]

    def _op(self, dtype: torch.dtype, op: Op) -> Any:
        if dtype not in _HALVES:
            return {"sum": self._mpi.SUM, "min": self._mpi.MIN, "max": self._mpi.MAX}[op]
        if (dtype, op) not in self._half_ops:
            self._half_ops[dtype, op] = self._mpi.Op.Create(_half_operator(dtype, _COMBINE[op]), commute=True)
        return self._half_ops[dtype, op]


def half_sum(mpi: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """An MPI type of two bytes and the operator that sums ``dtype`` in it, for those who call mpi4py themselves."""
    operator = mpi.Op.Create(_half_operator(dtype, _COMBINE["sum"]), commute=True)
    return mpi.BYTE.Create_contiguous(2).Commit(), operator


def _half_operator(dtype: torch.dtype, combine: Callable[..., Tensor]) -> Callable[[Any, Any, Any], None]:
    """MPI's callback: combine the first buffer into the second."""

    def operator(incoming: Any, result: Any, datatype: Any) -> None:
        if not len(result):
            return
        ours = torch.frombuffer(result, dtype=dtype)
        combine(torch.frombuffer(incoming, dtype=dtype), ours, out=ours)

    return operator
