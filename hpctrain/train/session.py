"""A process's part in a job: its device, its engine, and the watch over its peers. Booted before any data is read."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from hpctrain.comm import horovod_settings
from hpctrain.comm.base import Communicator
from hpctrain.comm.patience import Limit, Limits
from hpctrain.comm.registry import choose, create
from hpctrain.comm.side_channel import SideChannel
from hpctrain.comm.start_limit import start_limit
from hpctrain.comm.turns import Turns
from hpctrain.comm.watch import Watch
from hpctrain.config.comm import CommConfig
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.placement import cores_of, node_name, number_in, own_binding
from hpctrain.topology.ranks import Topology, detect

_ENGINE_GRACE_S = 30.0
# malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Session:
    """What a job gives a rank. ``cores`` are this rank's share of its host."""

    comm: Communicator
    watch: Watch
    turns: Turns
    cores: int
    engine_reason: str


def choose_device(requested: str, topology: Topology) -> torch.device:
    """The device of this rank: with several GPUs in sight the one of its local rank, else the only one.

    Raises UserError for a GPU that there is not, MachineError where Slurm gave the job some that torch does not see.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        _require_none_allotted(topology.host)
        if requested == "auto":
            return torch.device("cpu")
        raise UserError("train.device is cuda, but torch sees no GPU: set train.device=cpu, or see `hpctrain doctor`")
    visible = torch.cuda.device_count()
    if visible > 1 and topology.local_rank >= visible:
        raise UserError(
            f"local rank {topology.local_rank} has no GPU of its own, host {topology.host} shows {visible}: "
            f"start at most {visible} ranks a host"
        )
    device = torch.device("cuda", topology.local_rank if visible > 1 else 0)
    torch.cuda.set_device(device)
    return device


def _require_none_allotted(host: str) -> None:
    """Without this a rank takes its CPU, and waits for ever for ranks that train on the GPUs of other hosts."""
    allotted = number_in("SLURM_GPUS_ON_NODE")
    if torch.version.cuda is not None and allotted:
        raise MachineError(
            f"host {host} has {allotted} GPUs in this job, but torch sees none: if others see theirs, leave it out "
            f"with --exclude={node_name(host)}, else see `hpctrain doctor`, or set "
            "train.device=cpu"
        )


def keep_freed_memory() -> None:
    """Let glibc keep the memory that a step frees, since the next step asks for it again.

    Given back to the system, its pages are faulted in anew: 5 to 25 % of a step on a CPU. Other C libraries have
    no such setting, and none is needed on a GPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def never() -> None:
    """Ask for no end."""


@contextmanager
def open_session(config: CommConfig, device: str, asked: Callable[[], str | None] = never) -> Iterator[Session]:
    """Join the job that the launcher describes; leave it when the block ends, however it ends.

    ``asked`` is called about once a second, or once a turn where there is one rank: a reason for this rank to stop.

    An exception that leaves the block ends the job on all ranks (``hpctrain.comm.abort``).
    """
    keep_freed_memory()
    limits = Limits(config.timeout_s, config.startup_timeout_s)
    comm, channel, reason = _start_engine(config, device, limits.start)
    watch = Watch(channel, comm, limits)
    turns = Turns(channel, comm.topology, asked)
    with watch.guard():
        turns.start()
        bindings = comm.all_gather_object(own_binding(comm.topology.host))
        cores = cores_of(comm.rank, bindings)
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(cores)
        yield Session(comm, watch, turns, cores, reason + horovod_settings.remark(comm.name))
        comm.arrive()
        comm.barrier()
    turns.close()
    watch.close()
    comm.close()


def _start_engine(config: CommConfig, device: str, limit: Limit) -> tuple[Communicator, SideChannel, str]:
    """The engine that ``config`` asks for, the channel beside it, and why it is this one."""
    topology = detect(os.environ)
    with start_limit(topology, config.engine, limit) as start:
        chosen = choose_device(device, topology)
        name, reason = choose(config.engine, topology, chosen)
        start(f"{name} on {chosen.type}")
        horovod_settings.ask_for(name, chosen, config.horovod.model_dump())
        # The watch is to end a job that hangs, since it can say why; the engine's own limit is for when it cannot.
        comm = create(name, topology, chosen, limit.seconds + _ENGINE_GRACE_S)
        return comm, SideChannel.open(comm), reason
