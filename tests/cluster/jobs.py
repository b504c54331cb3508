"""Ranks across the hosts of a cluster: started from the head by Open MPI's mpirun, whatever engine they use.

mpirun reaches the hosts by ``on`` instead of ssh, so no host runs a daemon. Environment variables travel along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.cluster.cluster import ON, Cluster
from tests.parallel.launch import Run, run_job

#: where ranks of the torch engine meet, which mpirun does not tell them
MASTER_PORT = 29500


def launch_on(
    cluster: Cluster,
    command: Sequence[str],
    timeout_s: float,
    *,
    hosts: int | None = None,
    ranks_per_host: int = 1,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Run ``command`` on ``ranks_per_host`` ranks of each of the first ``hosts`` hosts (default: of all).

    Ranks fill host after host. At the time limit and after the launcher's end what is left of the job is killed.
    """
    names = [host.name for host in cluster.hosts[:hosts]]
    slots = ",".join(f"{name}:{ranks_per_host}" for name in names)
    mpirun = ["mpirun", "--allow-run-as-root", "--host", slots, "--map-by", "slot", "--bind-to", "none"]
    settings = {
        "PRTE_MCA_plm_ssh_agent": str(ON),
        # Only the head can enter a host, so it starts all daemons itself.
        "PRTE_MCA_plm_ssh_no_tree_spawn": "1",
        "MASTER_ADDR": names[0],
        "MASTER_PORT": str(MASTER_PORT),
    }
    return run_job(cluster.head.command([*mpirun, *command]), timeout_s, {**settings, **(env or {})}, cluster.shared)
