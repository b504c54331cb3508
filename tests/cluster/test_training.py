"""Four nodes train as one machine does: every engine, started in every way, gives the same losses and parameters.

Results carry what only a real cluster has: bytes through each card, the scheduler's accounts, hosts by name.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from tests.cluster.host import Traffic
from tests.cluster.processes import until
from tests.cluster.slurm import Slurm
from tests.cluster.training import LIMIT_S, ROOT, Training, digits_config, losses, record_of, submit, train_alone
from tests.needs import needs

NODES, TASKS, STEPS = 4, 2, 12
HOSTS = ",".join(f"n{number}:{TASKS}" for number in range(1, NODES + 1))
#: what a user types in a batch script of his own, beside what `slurm/train.sbatch` does
MPIRUN = "mpirun --bind-to none hpctrain"
LAUNCHES = {
    "mpirun-mpi": ("mpi", MPIRUN),
    "mpirun-horovod": ("horovod", MPIRUN),
    "mpirun-torch": ("torch", f"MASTER_ADDR=n1 MASTER_PORT=15555 {MPIRUN}"),
    "horovodrun-gloo": ("horovod", f"horovodrun --gloo -np {NODES * TASKS} -H {HOSTS} hpctrain"),
    "horovodrun-mpi": ("horovod", f"horovodrun --mpi -np {NODES * TASKS} -H {HOSTS} hpctrain"),
}

pytestmark = pytest.mark.timeout(1.5 * LIMIT_S)


@pytest.fixture(scope="module", autouse=True)
def _modules() -> None:
    needs("sklearn", "nvidia.dali", "mpi4py", "horovod")


@pytest.fixture(scope="module")
def config(_nodes: Slurm) -> Path:
    return digits_config(_nodes, STEPS)


@pytest.fixture(scope="module")
def alone(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_alone(config, tmp_path_factory.mktemp("alone") / "run", NODES * TASKS)


def assert_same_as_alone(slurm: Slurm, training: Training, alone: Path, before: list[Traffic]) -> None:
    """``before`` is what had passed the nodes' cards until this job."""
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    traffic = [host.traffic().since(old) for host, old in zip(slurm.cluster.hosts[:NODES], before, strict=True)]
    assert not slurm.strangers()
    assert losses(training.run) == losses(alone)
    record = training.record()
    assert record["parameters_sha256"] == record_of(alone)["parameters_sha256"]
    assert (record["plan"]["world_size"], record["plan"]["nodes"]) == (NODES * TASKS, NODES)
    assert {row["host"] for row in record["ranks"]} == set(slurm.names[:NODES])
    # An all-reduce of N nodes sends 2 (N - 1) / N of the gradient's bytes through each card at least.
    least = STEPS * record["wire"]["bytes_per_step"] * (NODES - 1) / NODES
    assert all(passed.sent > least and passed.received > least for passed in traffic), (traffic, least)
    _accounts_agree(training)


def _accounts_agree(training: Training) -> None:
    """sacct lags behind the job by seconds."""
    assert until(lambda: {row["State"] for row in training.job.sacct("State")} == {"COMPLETED"}, 20)
    rows = training.job.sacct("NNodes", "NodeList")
    assert (rows[0]["NNodes"], rows[0]["NodeList"]) == (str(NODES), f"n[1-{NODES}]")


@pytest.mark.parametrize(
    ("engine", "mpi"), [("mpi", "pmix"), ("horovod", "pmix"), ("horovod", "none"), ("torch", "none")]
)
def test_srun_by_the_shipped_script(slurm: Slurm, config: Path, alone: Path, engine: str, mpi: str) -> None:
    before = [host.traffic() for host in slurm.cluster.hosts[:NODES]]
    env = {"HPCTRAIN_ENGINE": engine, "HPCTRAIN_MPI": mpi}
    training = submit(slurm, config, nodes=NODES, tasks=TASKS, env=env)
    training.job.wait_for("RUNNING", 30)
    assert slurm.squeue() == [f"{training.job.id} RUNNING n[1-{NODES}] None"]
    assert_same_as_alone(slurm, training, alone, before)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_other_launchers_in_an_allocation(slurm: Slurm, config: Path, alone: Path, launch: str) -> None:
    engine, command = LAUNCHES[launch]
    run = slurm.shared / "runs" / launch
    words = ["train", str(config), "--run-dir", str(run), "--set", f"comm.engine={engine}"]
    script = slurm.shared / f"{launch}.sh"
    script.write_text(f"#!/bin/bash\n{command} {shlex.join(words)}\n")
    before = [host.traffic() for host in slurm.cluster.hosts[:NODES]]
    job = slurm.sbatch([f"--nodes={NODES}", f"--ntasks-per-node={TASKS}", "--cpus-per-task=2", str(script)])
    assert_same_as_alone(slurm, Training(job, run), alone, before)


def test_scaling_over_one_two_and_four_nodes(slurm: Slurm, config: Path) -> None:
    out = slurm.shared / "scaling"
    options = ["--strong", "--tasks-per-node=1", "--repeats=1", f"--site={ROOT}/slurm/sites/cpu.env", f"--out={out}"]
    options = [word for option in options for word in option.split("=", 1)]
    overrides = ["train.batch_per_worker=64", "data.loader=dali"]
    done = slurm.call(
        [f"{ROOT}/slurm/scaling.sh", str(config), "1", "2", "4", *options, "--", *overrides], timeout_s=LIMIT_S
    )
    jobs = [slurm.job(line.split()[1].rstrip(":")) for line in done.stdout.splitlines() if line.startswith("job ")]
    assert [job.wait(LIMIT_S) for job in jobs] == ["COMPLETED"] * 4, done.stdout
    (series,) = json.loads((out / "report/scaling.json").read_text())["series"]
    assert [point["nodes"] for point in series["points"]] == [1, 2, 4]
    assert not slurm.strangers()
