"""What asks a run to end before it is finished: a signal, or the end of its job's time.

This is one rank's knowledge. That all ranks stop at the same step is agreed in ``hpctrain.comm.turns``, and what
they do then is the training program's business.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from datetime import datetime
from types import FrameType
from typing import Any

from hpctrain.launch.timelimit import TimeLimit

#: passed on to every rank by job scripts and launchers; each would end a process that does not expect it
_FORWARDED = ("USR1", "USR2")


class Requests:
    """Listens to ``signals`` ("USR1", "TERM"…) from its making to the end of its ``with`` block; None leaves all as
    they are.

    A handler notes the signal and does nothing else; the first one counts. ``limit`` is the end of the job's time
    where it is known. Only the main thread may make one that listens.

    Signals that are not listed: USR1 and USR2, which mean nothing else to a rank, are ignored. TERM ends this process
    at once, without a checkpoint, until the ranks have agreed to stop (``agreed``). INT is never touched: who types
    Ctrl-C does not wait for a checkpoint.
    """

    def __init__(self, signals: Sequence[str] | None = None) -> None:
        self.limit: TimeLimit | None = None
        self._caught: str | None = None
        self._agreed = False
        self._before: dict[signal.Signals, Any] = {}
        if signals is not None:
            for name in {*_FORWARDED, *signals}:
                self._set(signal.Signals[f"SIG{name}"], self._note if name in signals else signal.SIG_IGN)

    def _set(self, number: signal.Signals, handler: Any) -> None:
        before = signal.signal(number, handler)
        self._before.setdefault(number, before)
        # System calls of libraries in this thread are not to fail because a flag was set.
        signal.siginterrupt(number, False)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._caught = self._caught or signal.Signals(number).name

    def asked(self) -> str | None:
        """Why this rank is to stop soon, or None. Costs a comparison or two; any thread may call it."""
        if self._caught is not None:
            return self._caught
        if self.limit is not None and self.limit.left_s <= 0:
            return f"the job's time limit ({datetime.fromtimestamp(self.limit.end_s):%Y-%m-%d %H:%M:%S})"
        return None

    def agreed(self) -> None:
        """Ignore all requests, and SIGTERM in any case, to the end of this process: the ranks stop now.

        srun sends SIGTERM to the ranks that are still there when the first has left, which must not turn their status
        into 143; and where Slurm is ending the job, the last checkpoint has the time until SIGKILL, its KillWait.
        """
        self._agreed = True
        if self._before:
            for number in {*self._before, signal.SIGTERM}:
                self._set(number, signal.SIG_IGN)

    def __enter__(self) -> Requests:
        return self

    def __exit__(self, *_: object) -> None:
        """Give the signals their former meaning, unless the ranks have agreed to stop."""
        if not self._agreed:
            for number, handler in self._before.items():
                signal.signal(number, handler)
