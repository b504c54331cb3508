"""The ranks of one competitor as the bench sees them: asleep until it is their turn, and gone when the bench goes.

Asleep means stopped (SIGSTOP): the threads that some libraries keep polling in the background use no core then.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from textwrap import shorten

import psutil

from hpctrain.bench.gradients import launching
from hpctrain.bench.gradients.groups import Group
from hpctrain.bench.gradients.line import BEAT, Call, Message, wait_readable
from hpctrain.errors import MachineError, UserError

#: how long the ranks beside one that failed may take to say the same
_GRACE_S = 5.0
_POLL_S = 0.2
#: most characters of a group's last line that a message repeats
_SAID = 200


class Crew:
    """A group's processes. Whatever goes wrong with them is a MachineError that names group and rank."""

    def __init__(self, group: Group, ranks: int, address: str, folder: Path) -> None:
        self.group = group
        self._ranks = ranks
        self._log = folder / f"{group.name}.log"
        self._calls: dict[int, Call] = {}
        self._members: list[psutil.Process] = []
        self._owes_answers = False
        self._launched = launching.start(group, ranks, address, self._log)

    def admit(self, rank: int, call: Call) -> None:
        """Take in rank ``rank``, which has just called."""
        self._members.append(psutil.Process(call.pid))
        self._calls[rank] = call

    @property
    def is_complete(self) -> bool:
        return len(self._calls) == self._ranks

    def check_start(self, limit_s: float | None = None) -> None:
        """Raise MachineError when a process has ended, or ranks are missing after ``limit_s``."""
        missing = self._ranks - len(self._calls)
        if ended := [process for process in self._launched.processes if process.poll() is not None]:
            raise self._trouble(f"ended with status {ended[0].returncode} before all its ranks had started")
        if missing and limit_s is not None:
            raise self._trouble(f"has not started {missing} of its {self._ranks} ranks within {limit_s:.0f} s")

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Let the ranks run within the block; after it they sleep."""
        self._wake()
        try:
            yield
        finally:
            self._each(psutil.Process.suspend)

    def _wake(self) -> None:
        self._each(psutil.Process.resume)

    def ask(self, order: Mapping[str, object], limit_s: float) -> list[Message]:
        """Give all ranks ``order``; their answers by rank. A rank that shows no sign of life for ``limit_s`` is late.

        Raises UserError or MachineError as a rank reports it, MachineError when a rank is late or gone.
        """
        self._owes_answers = True
        for rank, call in self._calls.items():
            if not call.send(order):
                raise self._lost(rank)
        answers = self._await(limit_s)
        self._owes_answers = False
        self._raise_errors(answers)
        return [answers[rank] for rank in range(self._ranks)]

    def _await(self, limit_s: float) -> dict[int, Message]:
        answers: dict[int, Message] = {}
        alive_at = dict.fromkeys(self._calls, time.monotonic())
        while waiting := [rank for rank in self._calls if rank not in answers]:
            latest = min(waiting, key=lambda rank: alive_at[rank])
            failed = any("error" in answer for answer in answers.values())
            left_s = alive_at[latest] + (_GRACE_S if failed else limit_s) - time.monotonic()
            if left_s <= 0:
                self._raise_errors(answers)
                raise self._trouble(f"shows no progress on rank {latest} for {limit_s:.0f} s")
            readable = wait_readable([self._calls[rank] for rank in waiting], left_s)
            for rank in (rank for rank in waiting if self._calls[rank] in readable):
                messages = self._calls[rank].read()
                if messages is None:
                    # Before the errors of others: those are the echo.
                    raise self._lost(rank)
                alive_at[rank] = time.monotonic()
                for message in messages:
                    if BEAT not in message:
                        answers[rank] = message
        return answers

    def leave(self) -> None:
        """Tell the ranks to end. Those that are still starting, or owe answers and will not listen, are terminated."""
        self._wake()
        if self._owes_answers or not self.is_complete:
            self.terminate()
            return
        for call in self._calls.values():
            call.send({"do": "leave"})

    def terminate(self) -> None:
        """Ask the system to end the group; mpirun ends its ranks, and clears away what it keeps on disk."""
        for process in self._launched.processes:
            process.terminate()

    def has_ended(self, deadline: float) -> bool:
        """Whether the group's processes have ended by the ``deadline`` of the host's clock."""
        try:
            for process in self._launched.processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End what is left of the group, and wait until it is gone."""
        self._each(psutil.Process.kill)
        for process in self._launched.processes:
            process.kill()
            process.wait()
        psutil.wait_procs(self._members, timeout=_GRACE_S)
        for call in self._calls.values():
            call.close()

    def _each(self, act: Callable[[psutil.Process], None]) -> None:
        for member in self._members:
            with suppress(psutil.NoSuchProcess):
                act(member)

    def _raise_errors(self, answers: Mapping[int, Message]) -> None:
        """Raise what the first rank that failed said; a UserError has its own words."""
        for rank, answer in sorted(answers.items()):
            if "error" in answer:
                if answer["error"] == "user":
                    raise UserError(answer["text"])
                raise MachineError(f"{self.group.name} failed on rank {rank}: {answer['text']}")

    def _lost(self, rank: int) -> MachineError:
        # What it had to say may still be on its way to the log.
        time.sleep(_POLL_S)
        return self._trouble(f"has lost rank {rank}")

    def _trouble(self, what: str) -> MachineError:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        last = f"; the last it said: {shorten(lines[-1], _SAID)}" if lines else ""
        return MachineError(f"{self.group.name} {what}{last}")
