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
from hpctrain.train.samples import samples_seen
from tests.cluster.host import Traffic
from tests.cluster.processes import until
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


def assert_each_sample_once(run: Path) -> None:
    """In every epoch that is over, and none more often in the one under way."""
    *over, last = [counts for _, counts in sorted(samples_seen(run).items())]
    assert over and all(set(counts) == {1} for counts in over)
    assert set(last) <= {0, 1}


def traffic_of(slurm: Slurm) -> list[Traffic]:
    """What has passed the card of each node so far."""
    return [host.traffic() for host in slurm.cluster.hosts]


def assert_same_as_alone(slurm: Slurm, training: Training, alone: Path, before: list[Traffic]) -> None:
    """On all nodes; ``before`` is what had passed their cards until this job."""
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    traffic = [after.since(old) for after, old in zip(traffic_of(slurm), before, strict=True)]
    assert not slurm.strangers()
    assert losses(training.run) == losses(alone)
    record, expected = training.record(), record_of(alone)
    assert record["parameters_sha256"] == expected["parameters_sha256"]
    nodes = len(slurm.names)
    assert (record["plan"]["world_size"], record["plan"]["nodes"]) == (expected["plan"]["world_size"], nodes)
    assert {row["host"] for row in record["ranks"]} == set(slurm.names)
    # An all-reduce of N nodes sends 2 (N - 1) / N of the gradient's bytes through each card at least.
    least = len(training.steps()) * record["wire"]["bytes_per_step"] * (nodes - 1) / nodes
    assert all(passed.sent > least and passed.received > least for passed in traffic), (traffic, least)
    _accounts_agree(training, nodes)


def _accounts_agree(training: Training, nodes: int) -> None:
    """sacct lags behind the job by seconds."""
    assert until(lambda: {row["State"] for row in training.job.sacct("State")} == {"COMPLETED"})
    rows = training.job.sacct("NNodes", "NodeList")
    assert (rows[0]["NNodes"], rows[0]["NodeList"]) == (str(nodes), f"n[1-{nodes}]")


def write_config(folder: Path, data: Path, *, batch_per_worker: int, max_steps: int) -> Path:
    """small.yaml in ``folder``: a checkpoint every 5 steps, a line in steps.jsonl for each, all samples in the log."""
    path = folder / "small.yaml"
    sections = {
        "model": {"name": "resnet20"},
        "data": {
            "path": str(data),
            "loader": "dali",
            "threads": 1,
            "image_size": 8,
            "channels": 1,
            "flip": False,
            "log_samples": True,
        },
        "train": {
            "epochs": 100,
            "max_steps": max_steps,
            "batch_per_worker": batch_per_worker,
            "last_batch": "pad",
            "device": "cpu",
        },
        "optimizer": {"nesterov": True},
        "schedule": {"kind": "cosine", "lr": 0.1, "warmup_epochs": 1},
        "gradients": {"reduction": "ordered"},
        "checkpoint": {"every_steps": 5, "keep": 3},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path


def digits_config(slurm: Slurm, max_steps: int, batch_per_worker: int = 16) -> Path:
    """The digits in the shared folder, and a configuration that trains on them."""
    data = slurm.shared / "digits"
    make_digits(data)
    return write_config(slurm.shared, data, batch_per_worker=batch_per_worker, max_steps=max_steps)


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
    return Training(job, Path(settings.get("HPCTRAIN_RUN_DIR", runs / f"{config.stem}-{job.id}")))
