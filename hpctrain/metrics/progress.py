"""What the person in front of the run sees: a live bar on a terminal, plain lines in a log file.

Rank 0 shows, the others have a display that shows nothing, so the loop asks no rank. Nothing here is read by
a program; that is what ``steplog`` and ``record`` are for.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TextIO

from hpctrain.metrics.steplog import EvalFigures, StepFigures


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run ends with; None where there was no evaluation, picture or record."""

    top1: float | None
    top5: float | None
    images_per_s: float
    minutes: float
    picture: Path | None
    record: Path | None

    def rows(self) -> list[tuple[str, str]]:
        """Name and value of each line of the closing block."""
        rows = [
            ("top-1", _percent(self.top1)),
            ("top-5", _percent(self.top5)),
            ("images/s", f"{_rate(self.images_per_s)} (median)"),
            ("minutes", f"{self.minutes:.1f}"),
        ]
        files = (("picture", self.picture), ("record", self.record))
        return rows + [(name, str(path)) for name, path in files if path is not None]


class Display(Protocol):
    """Called by the loop on every rank; ``close`` always, at the end or on the way out of an error.

    After it only messages may come, and ``finish``, on rank 0 alone.
    """

    def start(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Show the plan: a title, then name and value of each row."""

    def step(self, figures: StepFigures) -> None:
        """Show a logged step."""

    def evaluation(self, figures: EvalFigures) -> None:
        """Show an evaluation."""

    def message(self, text: str) -> None:
        """Show a line about something else: a checkpoint, a choice that was made, a warning."""

    def finish(self, summary: Summary) -> None:
        """Show what the run ended with."""

    def close(self) -> None:
        """Leave the terminal as it was; to do so again does nothing."""


def make_display(
    is_main: bool, *, epochs: int, total_steps: int, first_step: int = 0, stream: TextIO | None = None
) -> Display:
    """The display of this rank, writing to ``stream`` (standard output).

    ``total_steps`` is where the run will end, ``first_step`` where this process took over (0: a fresh run).
    """
    if not is_main:
        return SilentDisplay()
    stream = stream or sys.stdout
    course = Course(epochs, total_steps, first_step)
    return TerminalDisplay(course, stream) if _is_watched(stream) else PlainDisplay(course, stream)


def _is_watched(stream: TextIO) -> bool:
    """Whether ``stream`` is the terminal of a person, where a line can be redrawn.

    Open MPI gives each rank a terminal of its own, even where it tags the lines or they end in a file; but
    standard input is none there.
    """
    owned = sys.stdin is not None and sys.stdin.isatty()
    return owned and stream.isatty() and os.environ.get("TERM") != "dumb"


class Course:
    """How far the run is, in words."""

    def __init__(self, epochs: int, total_steps: int, first_step: int) -> None:
        self.epochs = epochs
        self.total_steps = total_steps
        self._first_step = first_step
        self._started_s = time.monotonic()

    def start(self) -> None:
        """Begin to count the time that steps take."""
        self._started_s = time.monotonic()

    def epoch(self, epoch: float) -> str:
        """``3/90`` in the third epoch, up to and with its end."""
        return f"{max(1, math.ceil(round(epoch, 6)))}/{self.epochs}"

    def eta(self, step: int) -> str:
        """Time left at the pace so far, evaluations and checkpoints included: ``1:02:33``, ``3 days, 4:05:06``."""
        pace_s = (time.monotonic() - self._started_s) / max(1, step - self._first_step)
        return str(timedelta(seconds=round(pace_s * max(0, self.total_steps - step))))


class SilentDisplay:
    """For every rank but the first."""

    def start(self, title: str, rows: Sequence[tuple[str, str]]) -> None: ...

    def step(self, figures: StepFigures) -> None: ...

    def evaluation(self, figures: EvalFigures) -> None: ...

    def message(self, text: str) -> None: ...

    def finish(self, summary: Summary) -> None: ...

    def close(self) -> None: ...


class PlainDisplay:
    """One line an event, each flushed at once: for log files, pipes and launchers that prefix lines."""

    def __init__(self, course: Course, stream: TextIO) -> None:
        self._course = course
        self._stream = stream

    def start(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self._course.start()
        self._print(_block(title, rows))

    def step(self, figures: StepFigures) -> None:
        texts = (*_step_texts(self._course, figures), f"ETA {self._course.eta(figures.step)}")
        self._print(" ".join(texts))

    def evaluation(self, figures: EvalFigures) -> None:
        self._print(_evaluation_line(self._course, figures))

    def message(self, text: str) -> None:
        self._print(text)

    def finish(self, summary: Summary) -> None:
        self._print(_block("finished", summary.rows()))

    def close(self) -> None:
        self._stream.flush()

    def _print(self, text: str) -> None:
        # A batch job's locale may not have the letters of a path: a log with escapes beats a dead run.
        encoding = self._stream.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)


class TerminalDisplay:
    """A bar that stays on the last two lines; evaluations and messages scroll past above it."""

    def __init__(self, course: Course, stream: TextIO) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        self._course = course
        self._console = Console(file=stream, highlight=False)
        # Once a second and at each logged step: the thread that draws takes its time from the loop.
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True), markup=False),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("ETA {task.fields[eta]}\ntop-1 {task.fields[top1]}", table_column=Column(no_wrap=True)),
            console=self._console,
            refresh_per_second=1,
            expand=True,
        )
        self._task = self._progress.add_task("first step", total=course.total_steps, eta="-", top1="-")

    def start(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        self._course.start()
        self.message(_block(title, rows))
        self._progress.start()

    def step(self, figures: StepFigures) -> None:
        self._progress.update(
            self._task,
            completed=figures.step,
            description="\n".join(_step_texts(self._course, figures)),
            eta=self._course.eta(figures.step),
            refresh=True,
        )

    def evaluation(self, figures: EvalFigures) -> None:
        self._progress.update(self._task, top1=_percent(figures.top1))
        self.message(_evaluation_line(self._course, figures))

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def finish(self, summary: Summary) -> None:
        self.message(_block("finished", summary.rows()))

    def close(self) -> None:
        self._progress.stop()


def _block(title: str, rows: Sequence[tuple[str, str]]) -> str:
    """A title and under it a table of names and values."""
    width = max((len(name) for name, _ in rows), default=0)
    return "\n".join([title, *(f"  {name:<{width}}  {value}" for name, value in rows)])


def _step_texts(course: Course, figures: StepFigures) -> tuple[str, str]:
    """Where the run is, and how it does."""
    return (
        f"epoch {course.epoch(figures.epoch)} step {figures.step}/{course.total_steps}",
        f"loss {figures.loss:.4g} lr {figures.lr:.4g} {_rate(figures.images_per_s)} img/s",
    )


def _evaluation_line(course: Course, figures: EvalFigures) -> str:
    return (
        f"epoch {course.epoch(figures.epoch)} step {figures.step} evaluation: top-1 {_percent(figures.top1)} "
        f"top-5 {_percent(figures.top5)} loss {figures.loss:.4g} on {figures.seen} samples in {figures.seconds:.1f} s"
    )


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.2f} %"


def _rate(images_per_s: float) -> str:
    return f"{images_per_s:.0f}" if images_per_s >= 100 else f"{images_per_s:.3g}"
