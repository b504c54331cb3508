"""The run as it goes: one line of JSON a logged step in ``steps.jsonl``, one an evaluation in ``evals.jsonl``.

Rank 0 appends while it trains; a line is one write, so a kill costs at most the line under way. The two kinds
of line are in two files so that each file is a table, which ``jsonfiles.read_log`` reads. The summary of a finished
run is ``record``.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.metrics.jsonfiles import cannot_log, encode_line, read_log_if_any, write_atomic
from hpctrain.metrics.layout import EVALS_FILE, STEPS_FILE
from hpctrain.metrics.stragglers import Straggler


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What is told of a logged step.

    ``step`` counts finished optimizer steps, ``epoch`` passes over the training set (2.5: halfway through the
    third). ``loss`` is the mean over the global batch, ``images_per_s`` the rate since the last logged step,
    ``phases_s`` median seconds of each phase since then. ``counters`` become further keys of the line; so do
    ``stragglers``, the ranks that are slow now, if there are any.
    """

    step: int
    epoch: float
    loss: float
    lr: float
    images_per_s: float
    phases_s: Mapping[str, float]
    counters: Mapping[str, float] = field(default_factory=dict)
    stragglers: Sequence[Straggler] = ()

    def to_line(self) -> dict[str, Any]:
        """The stable keys, then the counters, then stragglers."""
        line: dict[str, Any] = {
            "step": self.step,
            "epoch": self.epoch,
            "loss": self.loss,
            "lr": self.lr,
            "images_per_s": self.images_per_s,
            "phases_s": dict(self.phases_s),
        }
        assert line.keys().isdisjoint(self.counters), f"a counter has a stable key's name: {sorted(self.counters)}"
        slow = {"stragglers": [straggler.to_line() for straggler in self.stragglers]} if self.stragglers else {}
        return {**line, **self.counters, **slow}


@dataclass(frozen=True, slots=True)
class EvalFigures:
    """One pass over the validation set after ``step``: fractions ``top1`` and ``top5`` of ``seen`` samples."""

    step: int
    epoch: float
    loss: float
    top1: float
    top5: float
    seen: int
    seconds: float

    def to_line(self) -> dict[str, Any]:
        """The keys of a line of ``evals.jsonl``."""
        return {name: getattr(self, name) for name in self.__slots__}


class StepLog:
    """Writer of both files in ``run_dir``; rank 0 alone makes one.

    On resume from ``resumed_step`` (0: a fresh run) the lines of later steps, and a torn last line, are
    dropped first: those steps run again. Raises MachineError when a file cannot be written.
    """

    def __init__(self, run_dir: Path, resumed_step: int = 0) -> None:
        self._steps = _open_after(run_dir / STEPS_FILE, resumed_step)
        self._evals = _open_after(run_dir / EVALS_FILE, resumed_step)

    def step(self, figures: StepFigures) -> None:
        """Append one line to ``steps.jsonl``."""
        _append(self._steps, figures.to_line())

    def evaluation(self, figures: EvalFigures) -> None:
        """Append one line to ``evals.jsonl``."""
        _append(self._evals, figures.to_line())

    def close(self) -> None:
        """Close both files; further calls do nothing."""
        self._steps.close()
        self._evals.close()


def _open_after(path: Path, resumed_step: int) -> io.FileIO:
    """``path`` open for appending, its lines ending with ``resumed_step``."""
    kept = [line for line in read_log_if_any(path) if line["step"] <= resumed_step]
    if path.exists():
        write_atomic(path, b"".join(map(encode_line, kept)))
    try:
        return io.FileIO(path, "a")
    except OSError as error:
        raise cannot_log(path, error) from error


def _append(stream: io.FileIO, line: Mapping[str, Any]) -> None:
    """Unbuffered, so that what a killed process had logged is in the file; one write, unless the disk runs full."""
    left = encode_line(line)
    try:
        while left:
            left = left[stream.write(left) :]
    except OSError as error:
        raise cannot_log(Path(str(stream.name)), error) from error
