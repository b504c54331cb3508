"""NCCL through CuPy for the MPI engine on GPUs: MPI hands round NCCL's id, NCCL moves the buffers.

Order on the device: an operation waits for what the caller's stream holds at its start, runs on the communicator's
own stream so that it overlaps with compute, and ``Work.wait`` makes the caller's stream wait for it. The host
never blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hpctrain.comm.base import Communicator, FinishedWork, Op, Work
from hpctrain.comm.checks import as_bytes, faults, require_output, require_parts, require_reducible
from hpctrain.errors import UserError

NAME = "mpi"
_REDUCIBLE = {
    torch.float16: "NCCL_FLOAT16",
    torch.bfloat16: "NCCL_BFLOAT16",
    torch.float32: "NCCL_FLOAT32",
    torch.float64: "NCCL_FLOAT64",
    torch.int32: "NCCL_INT32",
    torch.int64: "NCCL_INT64",
}
_OPS = {"sum": "NCCL_SUM", "min": "NCCL_MIN", "max": "NCCL_MAX"}


def has_nccl() -> bool:
    """Whether CuPy and its NCCL can be imported."""
    try:
        from cupy.cuda import nccl
    except ImportError:
        return False
    return bool(nccl.available)


def start_nccl(host: Communicator, device: torch.device) -> Communicator:
    """NCCL's communicator over the ranks of ``host``, on ``device`` of this rank. Collective.

    Raises UserError where CuPy is missing, MachineError where NCCL cannot start.
    """
    try:
        # After torch, whose NCCL CuPy then shares: two NCCL libraries in one process crash it.
        from cupy.cuda import nccl
    except ImportError as error:
        raise UserError(f"the mpi engine needs CuPy on a GPU ({error}): install the extra [gpu]") from error
    unique_id = nccl.get_unique_id() if host.rank == 0 else None
    shared_id = tuple(host.broadcast_object(unique_id))
    with faults(host.topology, NAME, "NCCL start", nccl.NcclError), torch.cuda.device(device):
        comm = nccl.NcclCommunicator(host.world_size, shared_id, host.rank)
        return CupyNcclCommunicator(host, device, nccl, comm, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]


class _StreamWork:
    """Over, for the caller's stream, once that waits for ``event``; holds the buffers until then."""

    def __init__(self, event: torch.cuda.Event, buffers: tuple[Tensor, ...]) -> None:
        self._event, self._buffers = event, buffers

    def wait(self) -> None:
        self._event.wait()
        self._buffers = ()


class CupyNcclCommunicator(Communicator):
    """One NCCL communicator and its stream, beside the host communicator that carries small values."""

    name = NAME

    def __init__(self, host: Communicator, device: torch.device, nccl: Any, comm: Any, stream: Any) -> None:
        super().__init__(host.topology, device)
        self._host, self._nccl, self._comm, self._stream = host, nccl, comm, stream
        # CuPy for an older NCCL knows no bfloat16.
        self.reducible = tuple(dtype for dtype, name in _REDUCIBLE.items() if hasattr(nccl, name))

    def all_reduce_(self, buffer: Tensor, op: Op = "sum") -> Work:
        kind, native = self._reducible(buffer), getattr(self._nccl, _OPS[op])
        pointer = buffer.data_ptr()
        return self._start(
            lambda stream: self._comm.allReduce(pointer, pointer, buffer.numel(), kind, native, stream), buffer
        )

    def reduce_scatter_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(buffer, output, self.world_size)
        kind, pointers = self._reducible(buffer), (buffer.data_ptr(), output.data_ptr())
        return self._start(
            lambda stream: self._comm.reduceScatter(*pointers, output.numel(), kind, self._nccl.NCCL_SUM, stream),
            buffer,
            output,
        )

    def all_gather_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, self.world_size)
        pointers, count = (buffer.data_ptr(), output.data_ptr()), as_bytes(buffer).numel()
        return self._start(
            lambda stream: self._comm.allGather(*pointers, count, self._nccl.NCCL_UINT8, stream), buffer, output
        )

    def all_to_all_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, 1)
        return self._start(lambda stream: self._exchange(output, buffer, stream), buffer, output)

    def gather_(self, output: Tensor | None, buffer: Tensor, root: int = 0) -> Work:
        if self.rank != root:
            return self._start(lambda stream: self._gather(None, buffer, root, stream), buffer)
        whole = require_output(output, buffer, self.world_size)
        return self._start(lambda stream: self._gather(whole, buffer, root, stream), buffer, whole)

    def broadcast_(self, buffer: Tensor, root: int = 0) -> Work:
        pointer, count = buffer.data_ptr(), as_bytes(buffer).numel()
        return self._start(lambda stream: self._comm.bcast(pointer, count, self._nccl.NCCL_UINT8, root, stream), buffer)

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        host = self._host.split(ranks)
        return None if host is None else start_nccl(host, self.device)

    def barrier(self) -> None:
        self._host.barrier()

    def abort(self, code: int) -> None:
        self._host.abort(code)

    def close(self) -> None:
        self._stream.synchronize()
        self._comm.destroy()
        self._host.close()

    def versions(self) -> dict[str, str]:
        import cupy

        return {**self._host.versions(), "cupy": cupy.__version__, "nccl": str(self._nccl.get_version())}

    def all_gather_object(self, value: Any) -> list[Any]:
        self.arrive()
        return self._host.all_gather_object(value)

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        self.arrive()
        return self._host.broadcast_object(value, root)

    def _exchange(self, output: Tensor, buffer: Tensor, stream: int) -> None:
        part = as_bytes(buffer).numel() // self.world_size
        self._nccl.groupStart()
        for peer in range(self.world_size):
            offset = peer * part
            self._comm.send(buffer.data_ptr() + offset, part, self._nccl.NCCL_UINT8, peer, stream)
            self._comm.recv(output.data_ptr() + offset, part, self._nccl.NCCL_UINT8, peer, stream)
        self._nccl.groupEnd()

    def _gather(self, output: Tensor | None, buffer: Tensor, root: int, stream: int) -> None:
        part = as_bytes(buffer).numel()
        self._nccl.groupStart()
        self._comm.send(buffer.data_ptr(), part, self._nccl.NCCL_UINT8, root, stream)
        if output is not None:
            for peer in range(self.world_size):
                self._comm.recv(output.data_ptr() + peer * part, part, self._nccl.NCCL_UINT8, peer, stream)
        self._nccl.groupEnd()

    def _reducible(self, buffer: Tensor) -> Any:
        require_reducible(NAME, buffer, self.reducible)
        return getattr(self._nccl, _REDUCIBLE[buffer.dtype])

    def _start(self, call: Callable[[int], Any], *buffers: Tensor) -> Work:
        if buffers[0].numel() == 0:
            return FinishedWork()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with faults(self.topology, NAME, "NCCL call", self._nccl.NcclError):
            call(self._stream.cuda_stream)
        return _StreamWork(self._stream.record_event(), buffers)
