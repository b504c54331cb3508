"""Training on the cluster under test by the shipped job script: a small net, real pictures in JPEG shards, DALI.

``reduction: ordered`` adds in the same order on every engine and network, so runs can be compared bit for bit.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.data.digits import make_digits
from hpctrain.metrics.layout import CHECKPOINTS, checkpoint_name
from tests.cluster.slurm import Slurm
from tests.cluster.slurm_job import Job
from tests.parallel.launch import launch

ROOT = Path(__file__).resolve().parents[2]
TRAIN_SCRIPT = ROOT / "slurm/train.sbatch"
#: of the undisturbed run, on a machine that others use too
LIMIT_S = 240.0


@dataclass(frozen=True)
class Training:
    """A job and where its run is."""

    job: Job
    run: Path

    def steps(self) -> list[dict[str, Any]]:
        path = self.run / "steps.jsonl"
        return lines_of(path) if path.exists() else []

    def wait_for_step(self, step: int, timeout_s: float = LIMIT_S) -> None:
        self.job.wait_until(lambda: any(line["step"] >= step for line in self.steps()), timeout_s, f"reach step {step}")

    def wait_for_checkpoint(self, step: int, timeout_s: float = LIMIT_S) -> None:
        path = self.run / CHECKPOINTS / checkpoint_name(step)
        self.job.wait_until(path.exists, timeout_s, f"write the checkpoint of step {step}")

    def record(self) -> dict[str, Any]:
        return record_of(self.run)


def kill_ranks(slurm: Slurm, node: str) -> None:
    """SIGKILL to all that train on ``node``."""
    for process in slurm.cluster.host(node).processes():
        if process.name().startswith("python") and "train" in process.cmdline():
            process.kill()


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that may be growing."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "record.json").read_text())
    return record


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in lines_of(run / "steps.jsonl")]


def write_config(folder: Path, data: Path, *, batch_per_worker: int, max_steps: int) -> Path:
    """small.yaml in ``folder``: a checkpoint every 5 steps, a line in steps.jsonl for each."""
    path = folder / "small.yaml"
    sections = {
        "model": {"name": "resnet20"},
        "data": {"path": str(data), "loader": "dali", "threads": 1, "image_size": 8, "channels": 1, "flip": False},
        "train": {"epochs": 100, "batch_per_worker": batch_per_worker, "max_steps": max_steps, "device": "cpu"},
        "optimizer": {"nesterov": True},
        "schedule": {"kind": "cosine", "lr": 0.1, "warmup_epochs": 1},
        "gradients": {"reduction": "ordered"},
        "checkpoint": {"every_steps": 5, "keep": 3},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


def digits_config(slurm: Slurm, max_steps: int) -> Path:
    """The digits in the shared folder, and a configuration that trains on them."""
    make_digits(slurm.shared / "digits")
    return write_config(slurm.shared, slurm.shared / "digits", batch_per_worker=16, max_steps=max_steps)


def train_alone(config: Path, run: Path, num_ranks: int, *overrides: str, limit_s: float = LIMIT_S) -> Path:
    """The same on this machine, without hosts, cables or Slurm; returns ``run``."""
    command = ["train", str(config), "--run-dir", str(run)]
    for override in ("comm.engine=mpi", *overrides):
        command += ["--set", override]
    done = launch("mpirun", num_ranks, [sys.executable, "-m", "hpctrain", *command], limit_s)
    assert done.returncode == 0, done.output
    return run


def submit(
    slurm: Slurm,
    config: Path,
    *overrides: str,
    nodes: int,
    tasks: int,
    options: tuple[str, ...] = (),
    env: Mapping[str, str] | None = None,
) -> Training:
    """sbatch slurm/train.sbatch on ``nodes`` nodes with ``tasks`` ranks each."""
    runs = slurm.shared / "runs"
    size = [f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--cpus-per-task=2"]
    settings = {"HPCTRAIN_RUNS": str(runs), **(env or {})}
    job = slurm.sbatch([*size, *options, str(TRAIN_SCRIPT), str(config), *overrides], settings)
    return Training(job, runs / f"{config.stem}-{job.id}")
