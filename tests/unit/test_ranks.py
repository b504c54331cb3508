"""Rank tables: which launcher wins, what is filled in, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.topology.ranks import TABLES, Topology, detect, place

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
}
HOROVOD = {
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "6",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_CROSS_RANK": "1",
    "HOROVOD_CROSS_SIZE": "3",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
}
PMI = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
BATCH = {
    "SLURM_JOB_ID": "77",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
}
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
}
#: what PRRTE's daemon, started by srun inside an allocation, leaves in the environment of its ranks
DAEMON_STEP = {**STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"}

FROM_TORCHRUN = Topology(5, 8, 1, 4, 1, 2, "h", "torchrun")
FROM_HOROVOD = Topology(3, 6, 1, 2, 1, 3, "h", "horovodrun")
FROM_OPEN_MPI = Topology(3, 4, 1, 2, 1, 2, "h", "mpirun")
FROM_PMI = Topology(2, 4, 0, 2, 1, 2, "h", "mpiexec")
FROM_STEP = Topology(6, 8, 2, 4, 1, 2, "h", "srun")

CASES = {
    "plain python": ({}, Topology(host="h")),
    "torchrun": (TORCHRUN, FROM_TORCHRUN),
    "horovodrun": (HOROVOD, FROM_HOROVOD),
    "mpirun": (OPEN_MPI, FROM_OPEN_MPI),
    "mpiexec": (PMI, FROM_PMI),
    "srun": (STEP, FROM_STEP),
    "plain python in a batch script": (BATCH, Topology(host="h")),
    "the same where Slurm numbers the batch step": ({**BATCH, "SLURM_STEP_ID": "4294967291"}, Topology(host="h")),
    "an interactive step": ({**BATCH, "SLURM_STEP_ID": "4294967290"}, Topology(host="h")),
    "a step under its old name": (
        {**{k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}, "SLURM_STEPID": "3"},
        FROM_STEP,
    ),
    "mpirun in a batch script": ({**BATCH, **OPEN_MPI}, FROM_OPEN_MPI),
    "mpirun over srun's daemons": ({**DAEMON_STEP, **OPEN_MPI}, FROM_OPEN_MPI),
    "torchrun in a step": ({**STEP, **TORCHRUN}, FROM_TORCHRUN),
    "torchrun in mpirun": ({**OPEN_MPI, **TORCHRUN}, FROM_TORCHRUN),
    "horovodrun in a step": ({**STEP, **HOROVOD}, FROM_HOROVOD),
    "horovodrun in a batch script": ({**BATCH, **HOROVOD}, FROM_HOROVOD),
    "horovodrun in mpirun": ({**OPEN_MPI, **HOROVOD}, FROM_HOROVOD),
    "srun with PMI": ({**STEP, **PMI}, FROM_PMI),
    "a world size that a script exported": ({"WORLD_SIZE": "16", **OPEN_MPI}, FROM_OPEN_MPI),
    "empty variables": ({"RANK": "", "WORLD_SIZE": "", **OPEN_MPI}, FROM_OPEN_MPI),
    "an uneven step": (
        {**STEP, "SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "2",
         "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_TASKS_PER_NODE": "3(x2),1"},
        Topology(6, 7, 0, 1, 2, 3, "h", "srun"),
    ),
    "rank and size alone": ({"RANK": "2", "WORLD_SIZE": "3"}, Topology(2, 3, 2, 3, 0, 1, "h", "torchrun")),
}  # fmt: skip


@pytest.mark.parametrize(("environ", "expected"), CASES.values(), ids=CASES.keys())
def test_the_innermost_launcher_places_the_process(environ: dict[str, str], expected: Topology) -> None:
    assert detect(environ, host="h") == expected


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({**OPEN_MPI, **PMI}, "mpirun says OMPI_COMM_WORLD_RANK=3, OMPI_COMM_WORLD_SIZE=4 but mpiexec says PMI_RANK=2"),
        ({**TORCHRUN, "RANK": "two"}, "RANK='two' is not a whole number of at least 0"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1' is not a whole number of at least 0"),
        ({**TORCHRUN, "RANK": "1.5"}, "RANK='1.5' is not a whole number"),
        ({**HOROVOD, "HOROVOD_SIZE": "0"}, "HOROVOD_SIZE='0' is not a whole number of at least 1"),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4 is not below OMPI_COMM_WORLD_SIZE=4"),
        ({**STEP, "SLURM_PROCID": "8"}, "SLURM_PROCID=8 is not below SLURM_STEP_NUM_TASKS=8"),
        ({**PMI, "MPI_LOCALRANKID": "2"}, "MPI_LOCALRANKID=2 is not below the 2 ranks of this host that mpiexec tells"),
        ({**TORCHRUN, "GROUP_RANK": "²"}, "GROUP_RANK='²' is not a whole number"),
    ],
)
def test_what_cannot_be_is_named(environ: dict[str, str], text: str) -> None:
    with pytest.raises(UserError, match=re.escape(text)):
        detect(environ)


def test_sources_of_one_level_may_agree() -> None:
    same = {**PMI, "PMI_RANK": OPEN_MPI["OMPI_COMM_WORLD_RANK"], "PMI_SIZE": OPEN_MPI["OMPI_COMM_WORLD_SIZE"]}
    assert detect({**OPEN_MPI, **same}, host="h") == FROM_OPEN_MPI


@given(st.integers(1, 64), st.data())
def test_every_launcher_tells_the_same_of_the_same_place(world_size: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world_size - 1))
    for table in TABLES:
        environ = {table.rank[0]: str(rank), table.world_size[0]: str(world_size), "SLURM_STEP_ID": "1"}
        found = detect(environ)
        assert (found.rank, found.world_size, found.launcher) == (rank, world_size, table.launcher)
        assert found.local_rank < found.local_size
        assert found.node_rank < found.num_nodes


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=12))
def test_hosts_settle_the_places(hosts: list[str]) -> None:
    placed = [place(Topology(rank, len(hosts), rank, len(hosts)), hosts) for rank in range(len(hosts))]
    assert len({(found.node_rank, found.local_rank) for found in placed}) == len(hosts)
    for rank, found in enumerate(placed):
        assert (found.rank, found.host) == (rank, hosts[rank])
        assert found.local_size == hosts.count(hosts[rank])
        assert found.num_nodes == len(set(hosts))
        assert 0 <= found.local_rank < found.local_size
    assert placed[0].node_rank == 0


def test_a_group_counts_its_own_ranks_on_the_jobs_nodes() -> None:
    whole = Topology(rank=5, world_size=8, local_rank=1, local_size=4, node_rank=1, num_nodes=2, host="n1")
    assert whole.within([1, 5, 7]) == replace(whole, rank=1, world_size=3)


def test_a_launchers_own_local_rank_is_kept() -> None:
    """Open MPI may deal local ranks out in another order than ranks, and devices were chosen by them."""
    told = Topology(rank=1, world_size=4, local_rank=2, local_size=4)
    assert place(told, ["n"] * 4).local_rank == 2
