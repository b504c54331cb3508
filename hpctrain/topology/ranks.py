"""Who am I: rank, local rank and world size as a launcher's environment tells them.

What each launcher writes is data (``TABLES``); ``detect`` reads it, ``place`` corrects the node part once the
hosts of all ranks are known. Nothing here starts or asks another process.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from hpctrain.errors import UserError


@dataclass(frozen=True, slots=True)
class Topology:
    """The place of one process in a job.

    ``rank`` counts over the job (0 … world_size - 1), ``local_rank`` over the processes of one host
    (0 … local_size - 1), ``node_rank`` over the hosts (0 … num_nodes - 1).
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_size: int = 1
    node_rank: int = 0
    num_nodes: int = 1
    host: str = "localhost"
    launcher: str = "none"

    def within(self, ranks: Sequence[int]) -> Topology:
        """This rank's place among ``ranks``, of which it is one: counted there, on the job's nodes."""
        return replace(self, rank=list(ranks).index(self.rank), world_size=len(ranks))


@dataclass(frozen=True, slots=True)
class RankTable:
    """The variables one launcher sets; several names for one number are tried in turn.

    ``level`` orders nesting: the launcher of the highest level started this process last and wins. A table
    applies where both its rank and its world size are set.
    """

    launcher: str
    level: int
    rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...] = ()
    local_size: tuple[str, ...] = ()
    node_rank: tuple[str, ...] = ()
    num_nodes: tuple[str, ...] = ()


TORCHRUN = RankTable(
    "torchrun",
    level=4,
    rank=("RANK",),
    world_size=("WORLD_SIZE",),
    local_rank=("LOCAL_RANK",),
    local_size=("LOCAL_WORLD_SIZE",),
    node_rank=("GROUP_RANK",),
    num_nodes=("GROUP_WORLD_SIZE",),
)
HOROVODRUN = RankTable(
    "horovodrun",
    level=3,
    rank=("HOROVOD_RANK",),
    world_size=("HOROVOD_SIZE",),
    local_rank=("HOROVOD_LOCAL_RANK",),
    local_size=("HOROVOD_LOCAL_SIZE",),
    node_rank=("HOROVOD_CROSS_RANK",),
    num_nodes=("HOROVOD_CROSS_SIZE",),
)
# OMPI_COMM_WORLD_NODE_RANK counts processes of one host, not hosts: Open MPI tells no number of the node.
OPEN_MPI = RankTable(
    "mpirun",
    level=2,
    rank=("OMPI_COMM_WORLD_RANK",),
    world_size=("OMPI_COMM_WORLD_SIZE",),
    local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
    local_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
)
PMI = RankTable(
    "mpiexec",
    level=2,
    rank=("PMI_RANK",),
    world_size=("PMI_SIZE",),
    local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
    local_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
)
SRUN = RankTable(
    "srun",
    level=1,
    rank=("SLURM_PROCID",),
    world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
    local_rank=("SLURM_LOCALID",),
    node_rank=("SLURM_NODEID",),
    num_nodes=("SLURM_STEP_NUM_NODES", "SLURM_NNODES"),
)
TABLES = (TORCHRUN, HOROVODRUN, OPEN_MPI, PMI, SRUN)

#: Slurm numbers its own steps (batch script, interactive shell, extern) from here up (slurm.h).
_FIRST_SPECIAL_STEP = 0xFFFFFFF0


def detect(environ: Mapping[str, str], host: str | None = None) -> Topology:
    """The place that the innermost launcher in ``environ`` gives this process; without one, rank 0 of 1.

    Where a launcher is silent, ranks are taken to fill equal nodes in turn; ``place`` corrects that.

    Raises UserError when a variable is no such number, or when two launchers of one level disagree.
    """
    host = host or socket.gethostname()
    sources = [table for table in TABLES if _applies(table, environ)]
    if not sources:
        return Topology(host=host)
    level = max(table.level for table in sources)
    innermost = [table for table in sources if table.level == level]
    places = [_rank_and_size(table, environ) for table in innermost]
    for table, found in zip(innermost[1:], places[1:], strict=True):
        if found != places[0]:
            raise UserError(
                f"{_spell(innermost[0], environ)} but {_spell(table, environ)}: unset the variables of the launcher "
                "that did not start this process"
            )
    return _fill(innermost[0], *places[0], environ, host)


def place(topology: Topology, hosts: Sequence[str]) -> Topology:
    """``topology`` with its node part counted from the ``hosts`` of all ranks, in rank order.

    Nodes are numbered as they first appear. A launcher's own local rank is kept where its local size is right,
    since devices were chosen by it.
    """
    nodes = list(dict.fromkeys(hosts))
    host = hosts[topology.rank]
    neighbours = [rank for rank, name in enumerate(hosts) if name == host]
    local_rank = topology.local_rank if topology.local_size == len(neighbours) else neighbours.index(topology.rank)
    return replace(
        topology,
        host=host,
        local_rank=local_rank,
        local_size=len(neighbours),
        node_rank=nodes.index(host),
        num_nodes=len(nodes),
    )


def _applies(table: RankTable, environ: Mapping[str, str]) -> bool:
    if table is SRUN and not _in_slurm_step(environ):
        return False
    return _first(table.rank, environ) is not None and _first(table.world_size, environ) is not None


def _in_slurm_step(environ: Mapping[str, str]) -> bool:
    """True inside a step that srun started: the batch script's SLURM_PROCID=0 places nobody, and is inherited."""
    step = environ.get("SLURM_STEP_ID", environ.get("SLURM_STEPID", ""))
    return step.isdecimal() and int(step) < _FIRST_SPECIAL_STEP


def _first(names: Sequence[str], environ: Mapping[str, str]) -> str | None:
    return next((name for name in names if environ.get(name, "") != ""), None)


def _number(name: str, environ: Mapping[str, str], at_least: int) -> int:
    text = environ[name]
    if not text.isascii() or not text.isdecimal() or int(text) < at_least:
        raise UserError(
            f"{name}={text!r} is not a whole number of at least {at_least}: unset it or start by a launcher"
        )
    return int(text)


def _optional(names: Sequence[str], environ: Mapping[str, str], at_least: int) -> int | None:
    name = _first(names, environ)
    return None if name is None else _number(name, environ, at_least)


def _rank_and_size(table: RankTable, environ: Mapping[str, str]) -> tuple[int, int]:
    rank_name, size_name = _first(table.rank, environ), _first(table.world_size, environ)
    assert rank_name is not None and size_name is not None
    rank, size = _number(rank_name, environ, 0), _number(size_name, environ, 1)
    if rank >= size:
        raise UserError(f"{rank_name}={rank} is not below {size_name}={size}: unset both or start by a launcher")
    return rank, size


def _spell(table: RankTable, environ: Mapping[str, str]) -> str:
    names = (_first(table.rank, environ), _first(table.world_size, environ))
    return f"{table.launcher} says " + ", ".join(f"{name}={environ[name]}" for name in names if name)


def _fill(table: RankTable, rank: int, size: int, environ: Mapping[str, str], host: str) -> Topology:
    """Complete rank and size by what the launcher tells of nodes, and by equal nodes where it tells nothing."""
    node_rank = _optional(table.node_rank, environ, 0)
    num_nodes = _optional(table.num_nodes, environ, 1)
    local_size = _optional(table.local_size, environ, 1)
    if table is SRUN and local_size is None:
        local_size = _slurm_local_size(environ, node_rank)
    if local_size is None:
        local_size = -(-size // (num_nodes or 1))
    local_rank_name = _first(table.local_rank, environ)
    local_rank = rank % local_size if local_rank_name is None else _number(local_rank_name, environ, 0)
    if local_rank >= local_size:
        raise UserError(
            f"{local_rank_name}={local_rank} is not below the {local_size} ranks of this host that {table.launcher} "
            "tells of: unset its variables or start by a launcher"
        )
    return Topology(
        rank=rank,
        world_size=size,
        local_rank=local_rank,
        local_size=local_size,
        node_rank=rank // local_size if node_rank is None else node_rank,
        num_nodes=-(-size // local_size) if num_nodes is None else num_nodes,
        host=host,
        launcher=table.launcher,
    )


def _slurm_local_size(environ: Mapping[str, str], node_rank: int | None) -> int | None:
    """This node's entry of a list such as ``2(x3),1``, one number a node."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    sizes: list[int] = []
    for entry in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", entry)
        if match is None:
            return None
        sizes += [int(match[1])] * int(match[2] or 1)
    return sizes[node_rank] if node_rank is not None and node_rank < len(sizes) else None
