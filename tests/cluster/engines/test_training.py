"""Four nodes train as one machine does: every engine by the shipped script gives the same losses and parameters.

Results carry what only a real cluster has: bytes through each card, the scheduler's accounts, hosts by name.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from hpctrain.config.load import load_config
from tests.cluster.engines.conftest import NODES
from tests.cluster.slurm import Slurm
from tests.cluster.training import LIMIT_S, ROOT, assert_same_as_alone, submit, traffic_of

TASKS = 2

pytestmark = pytest.mark.timeout(1.5 * LIMIT_S)


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_srun_by_the_shipped_script(slurm: Slurm, config: Path, alone: Path, engine: str) -> None:
    before = traffic_of(slurm)
    training = submit(slurm, config, nodes=NODES, tasks=TASKS, env={"HPCTRAIN_ENGINE": engine})
    training.job.wait_for("RUNNING", 30)
    assert slurm.squeue() == [f"{training.job.id} RUNNING n[1-{NODES}] None"]
    assert_same_as_alone(slurm, training, alone, before)


def test_torch_by_the_shipped_script_on_shards_that_each_node_has_copied(
    slurm: Slurm, config: Path, alone: Path
) -> None:
    """To its own /tmp, which no other node sees."""
    before, data = traffic_of(slurm), slurm.shared / "digits"
    version = hashlib.sha256((data / "dataset.json").read_bytes()).hexdigest()[:12]
    copy = f"/tmp/disk/digits-{version}"
    env = {
        "HPCTRAIN_ENGINE": "torch",
        "HPCTRAIN_MPI": "none",
        "HPCTRAIN_STAGE": str(data),
        "HPCTRAIN_SCRATCH": "/tmp/disk",
    }
    training = submit(slurm, config, nodes=NODES, tasks=TASKS, env=env)
    assert_same_as_alone(slurm, training, alone, before)
    files = sum(1 for path in data.iterdir() if path.name != "dataset.json")
    for name in slurm.names:
        told = f"stage_in.sh: {name}: {files} of {files} files copied to {copy}, all checked"
        assert told in training.job.output, training.job.output
    assert load_config(training.run / "config.yaml").data.path == copy


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
