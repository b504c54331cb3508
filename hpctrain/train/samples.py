"""The sample log: which samples each rank was trained on in which optimizer step, and what became of it.

``samples/<rank>.jsonl`` holds a line a step: the launch (``launches.jsonl``), the step counted from 0, the epoch, and
the ids shown, padding left out. Lines are on the disk before the checkpoint that covers their steps has its name. A
step that was done again after a kill stands there twice, under two launches; only the later one is part of the
model's history.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.types import Batch
from hpctrain.errors import UserError
from hpctrain.metrics.jsonfiles import DurableLog, read_log
from hpctrain.metrics.launches import Launch, read_launches
from hpctrain.metrics.layout import CHECKPOINTS, SAMPLES, list_checkpoints, step_of


class SampleLog:
    """One rank's log of one launch."""

    def __init__(self, run_dir: Path, rank: int, launch: int) -> None:
        self._log = DurableLog(run_dir / SAMPLES / f"{rank}.jsonl")
        self._launch = launch

    def noting(self, batches: Iterator[Batch], first_step: int, accumulation: int) -> Iterator[Batch]:
        """``batches`` as they are, each step noted when its last micro-batch is taken."""
        ids: list[int] = []
        for taken, batch in enumerate(batches, start=1):
            ids += batch.sample_ids[: batch.request.valid].tolist()
            if taken % accumulation == 0:
                step = first_step + taken // accumulation - 1
                self._log.append({"launch": self._launch, "step": step, "epoch": batch.request.epoch, "ids": ids})
                ids = []
            yield batch

    def flush(self) -> None:
        """Return when every step noted is on the disk. Raises MachineError when it cannot be."""
        self._log.flush()

    def close(self) -> None:
        self._log.close()


def samples_seen(run_dir: Path) -> dict[int, np.ndarray]:
    """How often each sample was trained on: epoch -> counts [train_samples] int64, by sample id.

    Counted are the steps that the newest checkpoint consists of, each once, however often it was done. A sample that
    could not be decoded is not counted, its stand-in is. Raises UserError where a step's samples are not known.
    """
    newest = list_checkpoints(run_dir / CHECKPOINTS)
    if not newest:
        raise UserError(f"{run_dir} holds no checkpoint; name the folder of a run")
    launches = read_launches(run_dir)
    owners = owner_of_steps(launches, step_of(newest[0]))
    told = np.zeros(len(owners), dtype=np.int64)
    counts: dict[int, np.ndarray] = {}
    for rank in range(max(launch.world_size for launch in owners) if owners else 0):
        for line in _lines(run_dir, rank):
            step = line["step"]
            if step < len(owners) and owners[step].number == line["launch"]:
                told[step] += 1
                seen = counts.setdefault(line["epoch"], np.zeros(owners[step].train_samples, dtype=np.int64))
                np.add.at(seen, line["ids"], 1)
    for step, launch in enumerate(owners):
        if told[step] != launch.world_size:
            raise UserError(
                f"{run_dir / SAMPLES} tells of step {step + 1} on {told[step]} of {launch.world_size} ranks; "
                "set data.log_samples=true from the first step of a run to its last"
            )
    return counts


def owner_of_steps(launches: list[Launch], steps: int) -> list[Launch]:
    """For each of the first ``steps`` steps the launch whose doing it counts: the last that began at or before it."""
    owners: list[Launch] = []
    for launch in launches:
        owners[launch.step :] = [launch] * max(0, steps - launch.step)
    return owners


def _lines(run_dir: Path, rank: int) -> Iterator[dict[str, Any]]:
    path = run_dir / SAMPLES / f"{rank}.jsonl"
    return read_log(path) if path.exists() else iter(())
