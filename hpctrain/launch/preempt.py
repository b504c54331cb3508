"""What asks a run to end before it is finished: a signal, or the end of its job's time.

This is one rank's knowledge. That all ranks stop at the same step is agreed in ``hpctrain.comm.turns``, and what
they do then is the training program's business.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from datetime import datetime
from types import FrameType, TracebackType
from typing import Any

from hpctrain.launch.exits import PREEMPTED
from hpctrain.launch.timelimit import TimeLimit


class Requests:
    """Listens to ``signals`` ("USR1", "TERM"…) from its making to the end of its ``with`` block.

    A handler notes the signal and does nothing else; the first one counts. ``limit`` is the end of the job's time
    where it is known. Only the main thread may make one that listens.
    """

    def __init__(self, signals: Sequence[str] = ()) -> None:
        self.limit: TimeLimit | None = None
        self._caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}
        for number in (signal.Signals[f"SIG{name}"] for name in signals):
            self._before[number] = signal.signal(number, self._note)
            # System calls of libraries in this thread are not to fail because a flag was set.
            signal.siginterrupt(number, False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._caught = self._caught or signal.Signals(number).name

    def asked(self) -> str | None:
        """Why this rank is to stop soon, or None. Costs a comparison or two; any thread may call it."""
        if self._caught is not None:
            return self._caught
        if self.limit is not None and self.limit.left_s <= 0:
            return f"the job's time limit, {datetime.fromtimestamp(self.limit.end_s):%Y-%m-%d %H:%M:%S},"
        return None

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Give the signals their former meaning. After a preemption they are ignored instead: srun sends SIGTERM to
        the other tasks when the first has left, and the interpreter's end must not turn their status into 143."""
        preempted = isinstance(error, SystemExit) and error.code == PREEMPTED
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if preempted else handler)
