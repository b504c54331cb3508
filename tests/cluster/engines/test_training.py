"""Four nodes train as one machine does: every engine by the shipped script gives the same losses and parameters.

Results carry what only a real cluster has: bytes through each card, the scheduler's accounts, hosts by name.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cluster.engines.conftest import NODES
from tests.cluster.slurm import Slurm
from tests.cluster.training import LIMIT_S, ROOT, assert_same_as_alone, submit, traffic_of

TASKS = 2

pytestmark = pytest.mark.timeout(1.5 * LIMIT_S)


@pytest.mark.parametrize(("engine", "mpi"), [("mpi", "pmix"), ("horovod", "pmix"), ("torch", "none")])
def test_srun_by_the_shipped_script(slurm: Slurm, config: Path, alone: Path, engine: str, mpi: str) -> None:
    before = traffic_of(slurm)
    env = {"HPCTRAIN_ENGINE": engine, "HPCTRAIN_MPI": mpi}
    training = submit(slurm, config, nodes=NODES, tasks=TASKS, env=env)
    training.job.wait_for("RUNNING", 30)
    assert slurm.squeue() == [f"{training.job.id} RUNNING n[1-{NODES}] None"]
    assert_same_as_alone(slurm, training, alone, before)


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
