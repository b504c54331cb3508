"""The launches of a run, as ``launches.jsonl`` tells them: how often it was taken up, where, and how each was left.

Read by whoever starts, counts or accounts for them; written by the training program alone. It needs no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpctrain.metrics.jsonfiles import read_log_if_any
from hpctrain.metrics.layout import LAUNCHES_FILE


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch: the step it went on from, and its ranks.

    ``job`` is the Slurm job it was part of, if any: perhaps a ``task`` of an ``array``. ``slurm_restarts`` is how often
    Slurm had started that again by then. One that has not ``ended`` was killed, failed, or is still there. ``write_s``
    is its longest write of a checkpoint.
    """

    number: int
    step: int
    world_size: int
    train_samples: int
    job: str | None = None
    array: str | None = None
    task: int = 0
    slurm_restarts: int = 0
    ended: bool = False
    preempted: bool = False
    write_s: float = 0.0


def read_launches(run_dir: Path) -> list[Launch]:
    """In order; empty for a run directory that has none. Raises UserError for a damaged file."""
    lines = read_log_if_any(run_dir / LAUNCHES_FILE)
    ends = {line["launch"]: line for line in lines if line["event"] == "end"}
    return [_launch(line, ends.get(line["launch"])) for line in lines if line["event"] == "begin"]


def _launch(begin: Mapping[str, Any], end: Mapping[str, Any] | None) -> Launch:
    return Launch(
        number=begin["launch"],
        step=begin["step"],
        world_size=begin["world_size"],
        train_samples=begin["train_samples"],
        job=begin.get("slurm_job_id"),
        array=begin.get("slurm_array_job_id"),
        task=int(begin.get("slurm_array_task_id", "0")),
        slurm_restarts=int(begin.get("slurm_restart_count", "0")),
        ended=end is not None,
        preempted=end is not None and end["preempted"],
        write_s=end["write_s"] if end is not None else 0.0,
    )
