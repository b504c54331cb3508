"""The clock that scripts beside this one time calls with."""

from __future__ import annotations

import time
from collections.abc import Callable


def seconds_of(action: Callable[[], object]) -> float:
    """What one call of ``action`` takes."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s
