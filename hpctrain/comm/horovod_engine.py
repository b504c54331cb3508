"""The Horovod engine: its negotiation, response cache and rings (NCCL on GPUs, MPI or Gloo on CPUs).

Horovod is used as a library of collectives only; its optimizer wrappers, compression and averaging are not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hpctrain.comm import horovod_meeting, open_mpi, torch_engine
from hpctrain.comm import horovod_settings as settings
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
from hpctrain.comm.names import Names
from hpctrain.comm.process import end_process
from hpctrain.errors import UserError
from hpctrain.topology.probe import Probe
from hpctrain.topology.ranks import Topology

NAME = "horovod"
REMEDY = "build it for this torch with `make horovod` (or `python -m hpctrain.build_horovod`)"
REMEDY_GPU = "build it with NCCL by `make horovod GPU=1`, or set comm.engine=torch"
_REMEDY_WORLD = (
    "start it with horovodrun, mpirun, or srun --mpi=pmix, of the MPI that Horovod was built with "
    "(`hpctrain doctor` shows it), or set comm.engine=torch"
)


def probe() -> Probe:
    """Import Horovod's torch extension and tell what it was compiled with."""
    try:
        import horovod
        import horovod.torch as hvd
    except ModuleNotFoundError as error:
        return Probe(NAME, ok=False, reason=f"{error.name} is not installed", remedy=REMEDY)
    except (ImportError, OSError, RuntimeError) as error:
        return Probe(NAME, ok=False, reason=f"import horovod.torch fails: {error}", remedy=REMEDY)
    parts = {"MPI": hvd.mpi_built, "gloo": hvd.gloo_built, "NCCL": hvd.nccl_built, "CUDA": hvd.cuda_built}
    built_with = tuple(part for part, built in parts.items() if built())
    weak = torch.cuda.is_available() and "NCCL" not in built_with
    return Probe(
        NAME,
        ok=True,
        versions={"horovod": horovod.__version__, "torch": torch.__version__},
        built_with=built_with,
        reason="built without NCCL: buffers of the GPU would travel through the host" if weak else "",
        remedy=REMEDY_GPU if weak else "",
    )


def boot(topology: Topology, device: torch.device, timeout_s: float) -> Communicator:
    """Join the job's Horovod world.

    Raises UserError when Horovod's world is not the launcher's, or when it cannot do what the job asks of it.
    """
    import horovod.torch as hvd
    from horovod.torch import mpi_ops

    if device.type == "cuda" and not hvd.nccl_built():
        raise UserError(f"Horovod was built without NCCL and would copy GPU buffers through the host: {REMEDY_GPU}")
    for variable, value in settings.DEFAULTS.items():
        os.environ.setdefault(variable, value)
    open_mpi.tune(topology)
    if horovod_meeting.is_needed(topology, os.environ, over_mpi=hvd.mpi_built()):
        store = torch_engine.meet(topology, timeout_s)
        os.environ.update(horovod_meeting.meet(store, topology, lambda: serve_rendezvous()[1], os.environ))
    join(topology)
    settings.check_started(over_mpi=mpi_ops.mpi_enabled())
    return HorovodCommunicator(topology, device, hvd.global_process_set, _Shared(mpi_ops, list(range(hvd.size()))))


def join(topology: Topology) -> Any:
    """Start Horovod as the environment says; its module horovod.torch. UserError when its world is another one."""
    import horovod.torch as hvd

    with faults(topology, NAME, "start", RuntimeError, ValueError):
        hvd.init()
    require_same_world(topology, NAME, hvd.rank(), hvd.size(), _REMEDY_WORLD)
    return hvd


@dataclass
class _Shared:
    """What a world and the groups split from it have in common; ``ops`` is the module horovod.torch.mpi_ops."""

    ops: Any
    world: list[int]
    names: Names = field(default_factory=Names)
    process_sets: dict[tuple[int, ...], Any] = field(default_factory=dict)


class _HorovodWork:
    def __init__(self, comm: HorovodCommunicator, operation: str, start: Callable[[str], int], kind: str) -> None:
        self._comm, self._operation = comm, operation
        self._name = comm.shared.names.take(kind)
        with comm.faults(operation):
            self._handle: int | None = start(f"{kind}.{self._name[1]}")

    def wait(self) -> None:
        if self._handle is None:
            return
        handle, self._handle = self._handle, None
        # Releases the interpreter lock while it blocks.
        with self._comm.faults(self._operation):
            self._comm.shared.ops.synchronize(handle)
        self._comm.shared.names.give_back(self._name)


class HorovodCommunicator(Communicator):
    """A Horovod process set; ranks of the group are positions in it."""

    name = NAME

    def __init__(
        self, topology: Topology, device: torch.device, process_set: Any, shared: _Shared, *, is_split: bool = False
    ) -> None:
        super().__init__(topology, device)
        self._is_split = is_split
        self.shared = shared
        self._ops = shared.ops
        self._process_set = process_set
        self._world_ranks: list[int] = sorted(process_set.ranks) if process_set.process_set_id else shared.world

    def faults(self, operation: str) -> Any:
        from horovod.torch.mpi_ops import HorovodInternalError

        return faults(self.topology, NAME, operation, HorovodInternalError)

    def all_reduce_(self, buffer: Tensor, op: Op = "sum") -> Work:
        require_reducible(NAME, buffer, self.reducible)
        native = {"sum": self._ops.Sum, "min": self._ops.Min, "max": self._ops.Max}[op]
        return self._start(
            f"all_reduce_{op}",
            buffer,
            lambda name: self._ops.allreduce_async_(buffer, name=name, op=native, process_set=self._process_set),
        )

    # The public forms of the three operations below allocate their output; these take ours, which has the right
    # size, so that Horovod's resize of it does nothing.
    def reduce_scatter_(self, output: Tensor, buffer: Tensor) -> Work:
        require_reducible(NAME, buffer, self.reducible)
        require_parts(buffer, output, self.world_size)
        return self._start(
            "reduce_scatter",
            buffer,
            lambda name: self._ops._reducescatter_async(
                buffer, output, name, self._ops.Sum, self._process_set, 1.0, 1.0
            ),
        )

    def all_gather_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, self.world_size)
        sent, received = as_bytes(buffer), as_bytes(output)
        return self._start(
            "all_gather", sent, lambda name: self._ops._allgather_async(sent, received, name, self._process_set)
        )

    def all_to_all_(self, output: Tensor, buffer: Tensor) -> Work:
        require_parts(output, buffer, 1)
        return self._exchange("all_to_all", as_bytes(buffer), None, as_bytes(output))

    def gather_(self, output: Tensor | None, buffer: Tensor, root: int = 0) -> Work:
        # Horovod has no gather: an all-to-all in which everything goes to the root, and nothing to the others.
        sent, is_root = as_bytes(buffer), self.rank == root
        received = as_bytes(require_output(output, buffer, self.world_size)) if is_root else sent.new_empty(0)
        splits = torch.zeros(self.world_size, dtype=torch.int32, device="cpu")
        splits[root] = sent.numel()
        return self._exchange(f"gather_to_{root}", sent, splits, received)

    def broadcast_(self, buffer: Tensor, root: int = 0) -> Work:
        moved, world_root = as_bytes(buffer), self._world_ranks[root]
        return self._start(
            f"broadcast_from_{root}",
            moved,
            lambda name: self._ops.broadcast_async_(moved, world_root, name=name, process_set=self._process_set),
        )

    def split(self, ranks: Sequence[int]) -> Communicator | None:
        require_ascending(ranks)
        if len(self._world_ranks) < len(self.shared.world):
            raise ValueError("Horovod splits the world only: process sets are made by all ranks together")
        members = tuple(self._world_ranks[rank] for rank in ranks)
        if list(members) == self.shared.world:
            return HorovodCommunicator(self.topology, self.device, self._process_set, self.shared, is_split=True)
        # Horovod knows a set of ranks once only, and adding one is collective over the world.
        if members not in self.shared.process_sets:
            try:
                self.shared.process_sets[members] = self._ops.add_process_set(list(members))
            except ValueError as error:
                raise UserError(f"Horovod makes no groups of its ranks: {error}") from error
        if self.rank not in ranks:
            return None
        group, topology = self.shared.process_sets[members], self.topology.within(ranks)
        return HorovodCommunicator(topology, self.device, group, self.shared, is_split=True)

    def forget_subgroups(self) -> None:
        """Groups end with the world they were split from: after a restart they are split anew."""
        self.shared.process_sets.clear()
        self._subgroups.clear()

    def barrier(self) -> None:
        with self.faults("barrier"):
            self._ops.barrier(self._process_set)

    def abort(self, code: int) -> None:
        # Launchers of Horovod end the job when a rank leaves with an error.
        end_process(code)

    def close(self) -> None:
        if not self._is_split:
            self._ops.shutdown()

    def versions(self) -> dict[str, str]:
        import horovod

        controller = "mpi" if self._ops.mpi_enabled() else "gloo"
        found = {"horovod": horovod.__version__, "horovod_controller": controller}
        if (threshold := os.environ[settings.FUSION_THRESHOLD]) != "0":
            found["horovod_fusion_threshold"] = f"{threshold} (not reproducible)"
        return found

    def _exchange(self, operation: str, sent: Tensor, splits: Tensor | None, received: Tensor) -> Work:
        counts = torch.empty(self.world_size, dtype=torch.int32, device="cpu")
        return self._start(
            operation,
            sent,
            lambda name: self._ops._alltoall_async(sent, splits, received, counts, name, self._process_set),
        )

    def _start(self, operation: str, buffer: Tensor, start: Callable[[str], int]) -> Work:
        group = self._process_set.process_set_id
        kind = f"{operation}.{str(buffer.dtype).removeprefix('torch.')}.{buffer.numel()}.group{group}"
        return _HorovodWork(self, operation, start, kind)


def serve_rendezvous() -> tuple[Any, int]:
    """A server in this process where Gloo's ranks meet, any number of times, and its port."""
    from horovod.runner.http.http_server import RendezvousServer

    server = RendezvousServer()
    return server, server.start()


class ReleasedHorovod:
    """Horovod with the settings it was released with, in turn with this engine in the same process: a peer to be
    measured against.

    A turn restarts Horovod, so communicators split from ``comm`` end with it. Where Horovod runs on MPI, MPI must
    have been started first (``mpi_engine.start_mpi``): Horovod ends an MPI that it started, and MPI starts once.
    Constructor and turns are collective. Raises UserError when settings are not those it was released with.
    """

    def __init__(self, comm: HorovodCommunicator) -> None:
        settings.require_released()
        self._comm = comm
        self._restored = {name: os.environ[name] for name in settings.DEFAULTS}
        if comm.world_size > 1 and not comm.shared.ops.mpi_enabled():
            os.environ.update(_meeting_place(comm))

    @contextmanager
    def turn(self) -> Iterator[Any]:
        """The module horovod.torch, as released. After an error the engine's own settings do not come back."""
        import horovod.torch as hvd

        self._restart(hvd, settings.RELEASED)
        yield hvd
        self._restart(hvd, self._restored)

    def _restart(self, hvd: Any, environment: Mapping[str, str]) -> None:
        # Nobody may begin anew while another rank is still reading what the last start left.
        self._comm.barrier()
        hvd.shutdown()
        self._comm.forget_subgroups()
        os.environ.update(environment)
        join(self._comm.topology)


def _meeting_place(comm: Communicator) -> dict[str, str]:
    """A rendezvous server for Gloo that serves any number of starts: horovodrun's keeps addresses of the first one."""
    host = "127.0.0.1" if comm.topology.num_nodes == 1 else comm.topology.host
    host, port = comm.broadcast_object([host, serve_rendezvous()[1] if comm.rank == 0 else 0])
    return {"HOROVOD_GLOO_RENDEZVOUS_ADDR": host, "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port)}
