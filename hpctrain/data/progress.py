"""Progress of a long pass over many pictures: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

#: Opens a display for (title, number of pictures); what it gives is told of every so many that are done, and
#: may be called from several threads.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

_LINE_EVERY_S = 10.0


@contextmanager
def show_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Tell on standard error how many pictures are done, how many a second and how long it will take."""
    # Open MPI gives each rank a terminal of its own, which nobody looks at; standard input is none there.
    if not (sys.stderr.isatty() and sys.stdin.isatty()):
        yield _Lines(title, total)
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[rate]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[task].speed
            bar.update(task, advance=count, rate=f"{speed:,.0f} images/s" if speed else "")

        yield advance


@contextmanager
def no_progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Say nothing."""
    yield lambda count: None


class _Lines:
    """At most one line in ten seconds, for logs."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def __call__(self, count: int) -> None:
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._last < _LINE_EVERY_S:
                return
            self._last = now
            rate = self._done / (now - self._start)
        print(f"{self._title}: {self._done:,} of {self._total:,}, {rate:,.0f} images/s", file=sys.stderr, flush=True)
