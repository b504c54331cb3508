"""What only this rank can tell of a hang: where its engine wrote its trace, and where its training thread stands."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from hpctrain.comm.base import Communicator
from hpctrain.comm.side_channel import within

#: How long an engine may take to write its trace: the others' lingering covers it.
_TRACE_S = 2.0


class Evidence:
    """That of one rank, for whichever of its threads ends it."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._tracing = threading.Lock()
        self._trace_told: str | None = None

    def lines(self, late: Sequence[int]) -> str:
        """Further lines for a message that accuses the ranks ``late``: the trace, and of a late rank its stack."""
        return self._trace() + (self._stack() if self._comm.rank in late else "")

    def _trace(self) -> str:
        """Written once, though two threads may come to it."""
        with self._tracing:
            if self._trace_told is None:
                paths: list[Path | None] = []
                if not within(_TRACE_S, lambda: paths.append(self._comm.dump_trace())):
                    self._trace_told = f"\nthe {self._comm.name} engine could not write its trace"
                elif paths[0] is None:
                    self._trace_told = ""
                else:
                    self._trace_told = f"\nthe {self._comm.name} engine's trace of this rank is {paths[0]}"
            return self._trace_told

    def _stack(self) -> str:
        main = threading.main_thread().ident
        frame = sys._current_frames().get(main) if main is not None else None
        if frame is None:
            return ""
        return f"\nrank {self._comm.rank} stands at\n" + "".join(traceback.format_stack(frame)).rstrip()
