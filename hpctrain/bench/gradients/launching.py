"""The processes of a group: started as its launcher would, on this host, so that all of them die with the bench.

MPI's ranks come from `mpirun`. Those of horovodrun and torchrun are started directly with the variables that these
launchers set, since the launchers themselves look after their ranks all the time, on cores that are being measured.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hpctrain
from hpctrain.bench.gradients.groups import Group
from hpctrain.comm import horovod_engine, torch_engine
from hpctrain.errors import MachineError
from hpctrain.topology.ranks import TABLES, RankTable

WORKER = "hpctrain.bench.gradients.worker"

# prctl.h
_PR_SET_PDEATHSIG = 1
#: Variables of launchers around the bench, and of a Slurm job, that would tell ranks of another world. What users set
#: to steer their libraries (PRTE_MCA_, OMPI_MCA_, PMIX_MCA_, NCCL_, HOROVOD_FUSION_THRESHOLD, …) stays.
_FOREIGN = ("OMPI_", "PMI_", "PMIX_", "PRTE_", "SLURM_", "TORCHELASTIC_")
_STEERING = ("OMPI_MCA_", "PMIX_MCA_", "PRTE_MCA_", "OMPI_ALLOW_")
_FOREIGN_NAMES = frozenset({"HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS", "HOROVOD_GLOO_RENDEZVOUS_ADDR"})
_DAY_S = 86_400.0


@dataclass(frozen=True)
class Launched:
    """The processes to wait for: mpirun, or the ranks themselves; and the server through which those met."""

    processes: list[subprocess.Popen[bytes]]
    server: Any = None


def missing_launcher(group: Group) -> str | None:
    """Why the group's processes cannot be started here, or None."""
    return None if group.launcher != "mpirun" or _which("mpirun") else "mpirun is not on PATH"


def start(group: Group, ranks: int, address: str, log: Path) -> Launched:
    """Start the group's ``ranks`` processes, which call ``address``; what they print goes to the file ``log``."""
    command = [sys.executable, "-m", WORKER, address, group.name]
    environ = base_environment(os.environ, ranks)
    with log.open("wb") as sink:
        if group.launcher == "mpirun":
            mpirun = [str(_which("mpirun")), "-np", str(ranks), "--bind-to", "none"]
            return Launched([_spawn([*mpirun, *command], environ | mpi_environment(ranks, _cores()), sink)])
        meeting, server = {"horovodrun": _meet_horovod, "torchrun": _meet_torch}[group.launcher]()
        table = next(table for table in TABLES if table.launcher == group.launcher)
        places = [rank_environment(table, rank, ranks) for rank in range(ranks)]
        return Launched([_spawn(command, {**environ, **meeting, **place}, sink) for place in places], server)


def base_environment(environ: Mapping[str, str], ranks: int) -> dict[str, str]:
    """``environ`` without what other launchers told, and with this package and an equal share of the cores."""
    told: set[str] = {name for table in TABLES for field in _fields(table) for name in field} | _FOREIGN_NAMES
    kept = {
        name: value
        for name, value in environ.items()
        if name not in told and (name.startswith(_STEERING) or not name.startswith(_FOREIGN))
    }
    root = str(Path(hpctrain.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [kept.get("PYTHONPATH")])])
    return {"OMP_NUM_THREADS": str(max(1, _cores() // ranks)), **kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def mpi_environment(ranks: int, cores: int) -> dict[str, str]:
    """What Open MPI wants to be told before it starts ranks for root, or more of them than there are cores."""
    told: dict[str, str] = {}
    if os.geteuid() == 0:
        told |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if ranks > cores:
        told |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", "OMPI_MCA_mpi_yield_when_idle": "1"}
    return told


def rank_environment(table: RankTable, rank: int, ranks: int) -> dict[str, str]:
    """The variables by which the table's launcher tells a rank its place, all ranks being on this host."""
    numbers = (rank, ranks, rank, ranks, 0, 1)
    return {name: str(number) for field, number in zip(_fields(table), numbers, strict=True) for name in field}


def _fields(table: RankTable) -> Sequence[tuple[str, ...]]:
    return (table.rank, table.world_size, table.local_rank, table.local_size, table.node_rank, table.num_nodes)


def _meet_horovod() -> tuple[dict[str, str], Any]:
    """As `horovodrun --gloo` has it. Ranks sleep for longer than Gloo would wait for a peer, hence the limit."""
    server, port = horovod_engine.serve_rendezvous()
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": f"{_DAY_S:.0f}",
    }, server


def _meet_torch() -> tuple[dict[str, str], Any]:
    """As torchrun has it, whose agent keeps the store."""
    store = torch_engine.open_store("127.0.0.1", 0, serve=True, timeout_s=_DAY_S)
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }, store


def _spawn(command: Sequence[str], environ: Mapping[str, str], sink: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the bench alone, which then ends them in order.
            start_new_session=True,
            preexec_fn=dying_with_parent(signal.SIGTERM),
        )
    except OSError as error:
        raise MachineError(f"{command[0]} cannot be started: {error.strerror}") from error


def dying_with_parent(number: signal.Signals) -> Callable[[], None]:
    """A function that lets the calling process get signal ``number`` when the process that started it dies."""
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(_PR_SET_PDEATHSIG, int(number))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _which(program: str) -> str | None:
    """The program of this environment, active or not, before others."""
    here = str(Path(sys.executable).parent)
    return shutil.which(program, path=here + os.pathsep + os.environ.get("PATH", os.defpath))
