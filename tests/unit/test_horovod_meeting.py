"""What Horovod's ranks are told when srun started them without anything that MPI could meet by."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from hpctrain.comm.horovod_meeting import interface_to, is_needed, meet
from hpctrain.comm.torch_engine import open_store
from hpctrain.errors import MachineError
from hpctrain.topology.ranks import Topology

STEP = Topology(rank=0, world_size=4, local_size=2, num_nodes=2, launcher="srun")


@pytest.mark.parametrize(
    ("topology", "environ", "over_mpi", "needed"),
    [
        (STEP, {}, True, True),
        (STEP, {"PMIX_NAMESPACE": "slurm.pmix.1.0"}, True, False),
        (STEP, {"PMIX_NAMESPACE": "slurm.pmix.1.0"}, False, True),
        (STEP, {"PMIX_NAMESPACE": "slurm.pmix.1.0", "HOROVOD_CONTROLLER": "gloo"}, True, True),
        (STEP, {"HOROVOD_CONTROLLER": "mpi"}, True, False),
        (Topology(launcher="srun"), {}, True, False),
        (Topology(world_size=4, launcher="mpiexec"), {}, True, False),
        (Topology(world_size=4, launcher="horovodrun"), {"HOROVOD_CONTROLLER": "gloo"}, True, False),
    ],
)
def test_when_it_is_needed(topology: Topology, environ: dict[str, str], over_mpi: bool, needed: bool) -> None:
    assert is_needed(topology, environ, over_mpi=over_mpi) is needed


def test_all_ranks_are_told_what_horovodrun_would_tell_them() -> None:
    """Five ranks on two hosts, one more on the first: a loopback store in place of the job's."""
    hosts = ["localhost", "localhost", "localhost", "127.0.0.1", "127.0.0.1"]
    server = open_store("127.0.0.1", 0, serve=True, timeout_s=30)

    def told(rank: int) -> dict[str, str]:
        store = open_store("127.0.0.1", server.port, serve=False, timeout_s=30)
        # What a launcher says of a host with fewer ranks than others is put right by the hosts of all ranks.
        topology = Topology(
            rank=rank, world_size=5, local_rank=rank % 3, local_size=3, num_nodes=2, host=hosts[rank], launcher="srun"
        )
        return meet(store, topology, lambda: 4242, {"HOROVOD_GLOO_IFACE": "ib0"} if rank == 4 else {})

    with ThreadPoolExecutor(5) as pool:
        answers = list(pool.map(told, range(5)))
    names = ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    assert [[answer[f"HOROVOD_{name}"] for name in names] for answer in answers] == [
        ["0", "5", "0", "3", "0", "2"],
        ["1", "5", "1", "3", "0", "2"],
        ["2", "5", "2", "3", "0", "1"],
        ["3", "5", "0", "2", "1", "2"],
        ["4", "5", "1", "2", "1", "2"],
    ]
    meeting = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
    meeting |= {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "localhost", "HOROVOD_GLOO_RENDEZVOUS_PORT": "4242"}
    assert all(meeting.items() <= answer.items() for answer in answers)
    assert [answer["HOROVOD_GLOO_IFACE"] for answer in answers] == [interface_to("127.0.0.1")] * 4 + ["ib0"]


def test_the_interface_on_the_way_to_a_host() -> None:
    name = interface_to("127.0.0.1")
    assert any(entry.family == socket.AF_INET for entry in psutil.net_if_addrs()[name])


def test_no_way_to_a_host_is_told() -> None:
    with pytest.raises(MachineError, match="has no way to no-such-host.invalid"):
        interface_to("no-such-host.invalid")
