"""``launches.jsonl`` as rank 0 writes it: a line when training goes on, and one when it ends in order.

A launch that has a beginning and no end was killed or failed. What the numbers are good for: the record counts
restarts and preemptions, and the sample log tells by them which steps were done again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hpctrain.metrics.jsonfiles import DurableLog
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.layout import LAUNCHES_FILE

_SLURM = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT")


class Launches:
    """The launches of a run directory, this one included as soon as it has begun."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / LAUNCHES_FILE

    def begin(self, step: int, world_size: int, train_samples: int, environ: Mapping[str, str] = os.environ) -> int:
        """Note durably that training goes on from ``step``; returns the launch's number, from 0."""
        number = len(read_launches(self._path.parent))
        slurm = {name.lower(): environ[name] for name in _SLURM if name in environ}
        counts = {"step": step, "world_size": world_size, "train_samples": train_samples}
        self._append({"launch": number, "event": "begin", **counts, "time": _now(), **slurm})
        return number

    def end(self, number: int, step: int, reason: str, *, preempted: bool, write_s: float) -> None:
        """Note how launch ``number`` ended, in order."""
        figures = {"step": step, "reason": reason, "preempted": preempted, "write_s": write_s}
        self._append({"launch": number, "event": "end", **figures, "time": _now()})

    def _append(self, line: dict[str, Any]) -> None:
        log = DurableLog(self._path)
        try:
            log.append(line)
            log.flush()
        finally:
            log.close()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
