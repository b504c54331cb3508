"""Jobs of the shipped script that cannot work: they end with status 2 and have told why, once.

They run at the same time, each case on the nodes it takes.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.slurm_job import Job
from tests.cluster.training import LIMIT_S, submit, write_config
from tests.needs import needs
from tests.unit.image_folders import image_folder

PORT = 15001
LISTEN = f"import socket; s = socket.create_server(('', {PORT})); print(flush=True)\nwhile True: s.accept()"

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


@pytest.fixture(scope="module", autouse=True)
def _modules() -> None:
    needs("nvidia.dali", "mpi4py")


@pytest.fixture(scope="module")
def nodes(_slurm_possible: None) -> Iterator[Slurm]:
    """With GPUs that only those jobs have that ask for them."""
    with Slurm(num_nodes=4, tasks_per_node=2, rate="1gbit", gpus=2) as slurm:
        yield slurm


def on_a_folder_of_each_node(slurm: Slurm, config: Path) -> Job:
    return submit(slurm, config, nodes=2, tasks=1, env={"HPCTRAIN_RUNS": "/tmp/of-each-node"}).job


def where_the_port_is_taken(slurm: Slurm, config: Path) -> Job:
    env = {"HPCTRAIN_ENGINE": "torch", "HPCTRAIN_MPI": "none", "MASTER_PORT": str(PORT)}
    return submit(slurm, config, nodes=2, tasks=1, options=("--nodelist=n[1-2]",), env=env).job


def with_a_configuration_of_the_login_node(slurm: Slurm, config: Path) -> Job:
    slurm.call(["cp", str(config), "/tmp/small.yaml"])
    return submit(slurm, Path("/tmp/small.yaml"), nodes=2, tasks=1).job


def with_a_configuration_of_the_first_node(slurm: Slurm, config: Path) -> Job:
    slurm.cluster.hosts[2].run(["cp", str(config), "/tmp/small.yaml"])
    return submit(slurm, Path("/tmp/small.yaml"), nodes=2, tasks=1, options=("--nodelist=n[3-4]",)).job


def on_fewer_samples_than_ranks(slurm: Slurm, config: Path) -> Job:
    data = image_folder(slurm.shared / "two-pictures", {"train": 1, "val": 1}, ("ant", "bee"))
    overrides = (f"data.path={data}", "train.batch_per_worker=1")
    return submit(slurm, config, *overrides, nodes=1, tasks=3).job


def with_more_gpus_than_tasks(slurm: Slurm, config: Path) -> Job:
    return submit(slurm, config, nodes=2, tasks=1, options=("--gres=gpu:2",)).job


REFUSED: dict[Callable[[Slurm, Path], Job], str] = {
    on_a_folder_of_each_node: r"the run directory /tmp/of-each-node/small-\d+ is not shared: what rank 0 wrote",
    where_the_port_is_taken: rf"port {PORT} of n1, where the ranks were to meet, is taken by another program",
    with_a_configuration_of_the_login_node: r"the configuration /tmp/small.yaml cannot be read on node n\d: put it",
    with_a_configuration_of_the_first_node: r"the configuration /tmp/small.yaml cannot be read on all nodes: put it",
    on_fewer_samples_than_ranks: r"The global batch is 3 .*, but the training set has 2 samples: .* start fewer ranks",
    with_more_gpus_than_tasks: r"tasks and GPUs differ, 1 and 2 a node: submit with --ntasks-per-node=2, or ask for 1",
}


@contextmanager
def listener(slurm: Slurm) -> Iterator[None]:
    """Of another program, on the first node."""
    process = slurm.cluster.hosts[0].start(["python", "-c", LISTEN], slurm.env, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def refused(nodes: Slurm) -> dict[str, Job]:
    """All of them, submitted."""
    config = write_config(nodes.shared, nodes.shared / "none", batch_per_worker=16, max_steps=10)
    with listener(nodes):
        jobs = {prepare.__name__: prepare(nodes, config) for prepare in REFUSED}
        jobs[where_the_port_is_taken.__name__].wait(LIMIT_S)
    return jobs


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.__name__)
def test_refused(refused: dict[str, Job], case: Callable[[Slurm, Path], Job]) -> None:
    job = refused[case.__name__]
    assert (job.wait(LIMIT_S), job.exit_code) == ("FAILED", 2), job.output
    assert len(re.findall(REFUSED[case], job.output)) == 1, job.output
    assert "Traceback" not in job.output


def test_no_allocation_is_left_idle(nodes: Slurm, refused: dict[str, Job]) -> None:
    for job in refused.values():
        job.wait(LIMIT_S)
    assert nodes.squeue() == []
    assert not nodes.strangers()
