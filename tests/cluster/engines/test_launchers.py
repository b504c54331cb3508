"""Ranks that mpirun and horovodrun start, or Horovod over Gloo by srun, one per node: each engine trains as on one
machine."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cluster.engines.conftest import NODES
from tests.cluster.slurm import Slurm
from tests.cluster.training import LIMIT_S, Training, assert_same_as_alone, submit, traffic_of

TASKS = 1
#: what a user types in a batch script of his own, beside what `slurm/train.sbatch` does
MPIRUN = "mpirun --bind-to none hpctrain"
EACH = f"-np {NODES} -H n1:1,n2:1,n3:1,n4:1 hpctrain"
MEETING = "MASTER_ADDR=n1 MASTER_PORT=15555"
LAUNCHES = {
    "mpirun-mpi": ("mpi", MPIRUN),
    "mpirun-horovod": ("horovod", MPIRUN),
    "mpirun-torch": ("torch", f"{MEETING} {MPIRUN}"),
    "horovodrun-gloo": ("horovod", f"horovodrun --gloo {EACH}"),
    "horovodrun-mpi": ("horovod", f"horovodrun --mpi {EACH}"),
    "horovodrun-torch": ("torch", f"{MEETING} horovodrun --gloo {EACH}"),
}

pytestmark = pytest.mark.timeout(1.5 * LIMIT_S)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_launched_in_an_allocation(slurm: Slurm, config: Path, alone: Path, launch: str) -> None:
    engine, command = LAUNCHES[launch]
    run = slurm.shared / "runs" / launch
    words = ["train", str(config), "--run-dir", str(run), "--set", f"comm.engine={engine}"]
    script = slurm.shared / f"{launch}.sh"
    script.write_text(f"#!/bin/bash\n{command} {shlex.join(words)}\n")
    before = traffic_of(slurm)
    job = slurm.sbatch([f"--nodes={NODES}", f"--ntasks-per-node={TASKS}", "--cpus-per-task=2", str(script)])
    assert_same_as_alone(slurm, Training(job, run), alone, before)


def test_horovod_without_mpi_by_the_shipped_script(slurm: Slurm, config: Path, alone: Path) -> None:
    """Rank 0 starts Horovod's rendezvous."""
    before = traffic_of(slurm)
    training = submit(
        slurm, config, nodes=NODES, tasks=TASKS, env={"HPCTRAIN_ENGINE": "horovod", "HPCTRAIN_MPI": "none"}
    )
    assert_same_as_alone(slurm, training, alone, before)
