"""When a Slurm job's time is up, and when its last checkpoint must therefore begin."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

from hpctrain.errors import HpctrainError
from hpctrain.launch.slurm import ask_slurm

#: ranks learn of a request and agree on a step by way of a channel that each looks at once a second
_AGREEMENT_S = 3.0
_SQUEUE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class TimeLimit:
    """The end of the job's time in seconds since the epoch, and what the last checkpoint will take: how long writing
    one and taking a turn have taken so far."""

    end_s: float
    margin_s: float
    write_s: Callable[[], float]
    turn_s: Callable[[], float]

    @property
    def left_s(self) -> float:
        """Time left to train; nothing is left at 0 or below."""
        return stop_at_s(self.end_s, self.margin_s, self.write_s(), self.turn_s()) - time.time()


def stop_at_s(end_s: float, margin_s: float, write_s: float, turn_s: float) -> float:
    """When to begin to stop, so that a checkpoint that takes ``write_s`` is written ``margin_s`` before ``end_s``.

    The ranks first agree on a step; a rank may have begun one of ``turn_s`` just then, and a peer the next. An
    earlier checkpoint may still be on its way to the disk: it has to be written before the last one begins.
    """
    return end_s - margin_s - 2 * write_s - 2 * turn_s - _AGREEMENT_S


def job_end_s(environ: Mapping[str, str]) -> float | None:
    """When this job's time is up, or None outside Slurm, without a limit, or where nobody can tell.

    Slurm 22.05 and later says it in SLURM_JOB_END_TIME; before that `squeue` is asked. A time that has passed is
    another job's, whose variables were left over.
    """
    text = environ.get("SLURM_JOB_END_TIME", "")
    end_s = float(text) if text.isdigit() else None
    if end_s is None and "SLURM_JOB_ID" in environ:
        end_s = parse_end(_ask_squeue(environ))
    return end_s if end_s is not None and end_s > time.time() else None


def parse_end(text: str) -> float | None:
    """Seconds since the epoch of what squeue prints as a job's end: local time, or a word such as NONE or N/A."""
    try:
        return datetime.fromisoformat(text.strip()).timestamp()
    except ValueError:
        return None


def _ask_squeue(environ: Mapping[str, str]) -> str:
    command = ["squeue", "--noheader", f"--jobs={environ['SLURM_JOB_ID']}", "--format=%e"]
    try:
        return ask_slurm(command, {**environ, "SLURM_TIME_FORMAT": "standard"}, _SQUEUE_TIMEOUT_S)
    except (HpctrainError, OSError):
        return ""
