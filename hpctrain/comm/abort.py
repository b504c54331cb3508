"""How a job ends when something went wrong on one rank: the cause is told once, and no rank is left behind."""

from __future__ import annotations

import time
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

from hpctrain.errors import HpctrainError, MachineError
from hpctrain.topology.voice import sentence

if TYPE_CHECKING:
    from hpctrain.comm.watch import Watch

_INTERRUPTED = 130
#: ranks other than 0 leave it this long to tell a mistake that all of them found: in a job that runs they find it
#: together, so less than before they have met (``topology.voice``)
_PRECEDENCE_S = 1.0


class Guard:
    """A context around the run of one rank.

    In a job of one rank errors pass through, and an interrupt exits with 130. In a larger one an exception is told
    once, by the rank that had it first: UserError and MachineError as one sentence (exit 2 and 1), an interrupt as
    one line (130), anything else with its traceback (1); then all ranks end. SystemExit passes through.
    """

    def __init__(self, watch: Watch) -> None:
        self._watch = watch

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, SystemExit | GeneratorExit):
            return
        if self._watch.comm.world_size == 1:
            if isinstance(error, KeyboardInterrupt):
                raise SystemExit(_INTERRUPTED) from None
            return
        if isinstance(error, HpctrainError):
            self._end_told(error)
        head = f"[{self._watch.place}]"
        if isinstance(error, KeyboardInterrupt):
            self._end("interrupted", f"{head} interrupted", code=_INTERRUPTED)
        summary = traceback.format_exception_only(error)[0].splitlines()[0]
        self._end(summary, f"{head}\n" + "".join(traceback.format_exception(error)).rstrip(), code=1)

    def _end_told(self, error: HpctrainError) -> None:
        """End after an error of one sentence, which other ranks may have too: the lowest tells it."""
        rank = self._watch.comm.rank
        if rank > 0:
            time.sleep(_PRECEDENCE_S)
        if isinstance(error, MachineError):
            # An engine's error is often the echo of another rank's end.
            self._watch.wait_for_cause()
        head = f"[{self._watch.place}] " if rank > 0 else ""
        self._end(str(error), head + sentence(error), kind="told", code=error.exit_code)

    def _end(self, summary: str, printed: str, *, code: int, kind: str = "error") -> None:
        self._watch.report_failure(summary, printed, kind=kind, code=code)
        self._watch.comm.abort(code)
