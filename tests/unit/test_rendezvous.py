"""Where ranks meet when their launcher does not say."""

from __future__ import annotations

import re

import pytest

from hpctrain.errors import UserError
from hpctrain.topology.ranks import Topology
from hpctrain.topology.rendezvous import rendezvous

ONE_HOST = Topology(rank=1, world_size=4, local_rank=1, local_size=4, launcher="mpirun")
TWO_HOSTS = Topology(rank=1, world_size=4, local_rank=1, local_size=2, num_nodes=2, launcher="mpirun")
STEP = Topology(rank=1, world_size=4, local_rank=1, local_size=2, num_nodes=2, launcher="srun")
SLURM = {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "gpu[03-05,9]"}


def test_what_the_user_exports_counts() -> None:
    point = rendezvous({"MASTER_ADDR": "n7", "MASTER_PORT": "1234", **SLURM}, STEP)
    assert (point.host, point.port) == ("n7", 1234)


def test_one_host_meets_on_loopback_at_the_launchs_own_port() -> None:
    first, again, other = (rendezvous({"PMIX_NAMESPACE": name}, ONE_HOST) for name in ("job-1", "job-1", "job-2"))
    assert first == again
    assert first.host == "127.0.0.1"
    assert first.port != other.port
    assert first.job != other.job


@pytest.mark.parametrize("number", range(200))
def test_ports_stay_below_the_ephemeral_ones(number: int) -> None:
    assert 1024 < rendezvous({"PMIX_NAMESPACE": f"job-{number}"}, ONE_HOST).port < 32768


def test_a_step_meets_on_its_first_node() -> None:
    point = rendezvous(SLURM, STEP)
    assert (point.host, point.job) == ("gpu03", "77-0")
    assert point.port != rendezvous({**SLURM, "SLURM_STEP_ID": "1"}, STEP).port


@pytest.mark.parametrize(
    ("environ", "topology"),
    [
        ({"PMIX_NAMESPACE": "job-1"}, TWO_HOSTS),
        ({}, ONE_HOST),
        ({"PMI_ID": "1", "PMI_PORT": "n1:40001"}, ONE_HOST),
        ({**SLURM, "SLURM_DISTRIBUTION": "arbitrary"}, STEP),
        ({"MASTER_ADDR": "n7"}, TWO_HOSTS),
    ],
)
def test_no_meeting_point_is_an_error_with_its_remedy(environ: dict[str, str], topology: Topology) -> None:
    text = f"{topology.launcher} tells its ranks no address to meet at: export MASTER_ADDR (the host of rank 0)"
    with pytest.raises(UserError, match=re.escape(text)):
        rendezvous(environ, topology)


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none(port: str) -> None:
    with pytest.raises(UserError, match=f"MASTER_PORT='{port}' is not a port"):
        rendezvous({"MASTER_ADDR": "n7", "MASTER_PORT": port}, ONE_HOST)
