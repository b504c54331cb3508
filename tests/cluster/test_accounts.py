"""What Slurm's accounts say of a job stands in the record of its run when the job has ended, over a requeue as well."""

from __future__ import annotations

import pytest

from hpctrain.topology.hosts import hosts
from tests.cluster.slurm import Slurm
from tests.cluster.training import LIMIT_S, digits_config, submit
from tests.needs import needs

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


def test_the_record_has_the_accounts_of_each_start(slurm: Slurm) -> None:
    needs("sklearn", "nvidia.dali", "mpi4py")
    training = submit(slurm, digits_config(slurm, 80), nodes=2, tasks=1, env={"HPCTRAIN_ENGINE": "mpi"})
    training.wait_for_checkpoint(5)
    training.job.requeue()
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    accounts = training.record()["slurm"]
    first, second = accounts["starts"]
    assert (first["job"], first["state"]) == (training.job.id, "REQUEUED")
    assert list(hosts(second["nodes"])) == training.job.nodes
    assert [step["name"] for step in second["steps"]][-1] == "python"
    assert second["steps"][-1]["state"] == "COMPLETED"
    # A rank that trains holds torch in memory; the nodes have no sensors.
    assert accounts["max_rss_bytes"] > 100 * 2**20
    assert accounts["energy_j"] is None
    assert accounts["elapsed_s"] >= first["elapsed_s"] > 0
