"""Engines across hosts: every engine joins ranks of four hosts, and what passes the cards is what a ring sends."""

from __future__ import annotations

import sys

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.jobs import launch_on
from tests.needs import needs

ELEMENTS = 500_000
MODULES = {"torch": (), "mpi": ("mpi4py",), "horovod": ("horovod", "mpi4py")}

pytestmark = pytest.mark.timeout(90)


@pytest.mark.parametrize("engine", MODULES)
def test_an_engine_joins_four_hosts(cluster: Cluster, engine: str) -> None:
    needs(*MODULES[engine])
    before = [host.traffic() for host in cluster.hosts]
    run = launch_on(cluster, [sys.executable, "-m", "tests.cluster.across", engine, str(ELEMENTS)], timeout_s=60)
    traffic = [host.traffic().since(old) for host, old in zip(cluster.hosts, before, strict=True)]
    assert run.returncode == 0, run.output
    assert run.survivors == 0
    assert [run.results[rank] for rank in range(4)] == [
        {"host": f"n{number}", "num_nodes": 4, "local_size": 1, "sum": 10.0} for number in range(1, 5)
    ]
    # Each rank sends 2 (N - 1) / N of the buffer, whatever the algorithm among those that are used for this size.
    least = 1.5 * 4 * ELEMENTS
    assert all(least < passed.sent < 1.4 * least for passed in traffic), traffic


def test_ranks_fill_host_after_host(cluster: Cluster) -> None:
    needs("mpi4py")
    command = [sys.executable, "-m", "tests.cluster.across", "mpi", "1000"]
    run = launch_on(cluster, command, timeout_s=60, hosts=2, ranks_per_host=2)
    assert run.returncode == 0, run.output
    assert [run.results[rank]["host"] for rank in range(4)] == ["n1", "n1", "n2", "n2"]
    assert {found["num_nodes"] for found in run.results.values()} == {2}


def test_a_job_over_its_limit_leaves_no_process(cluster: Cluster) -> None:
    needs("mpi4py")
    run = launch_on(cluster, ["sleep", "5004"], timeout_s=3)
    assert run.timed_out
    # The head sees the processes of all hosts.
    assert "5004" not in cluster.head.run(["sh", "-c", "cat /proc/[0-9]*/cmdline 2>/dev/null | tr '\\0' '\\n'"]).stdout
