"""One job of the cluster under test, as scontrol and sacct tell of it."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

#: states in which a job stays; of a requeued job the last end counts
ENDED = frozenset(
    ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "PREEMPTED")
)
_POLL_S = 0.25
_KEY = re.compile(r"(?:^|(?<=\s))([A-Z][\w:/]*)=")


class Job:
    """``call`` runs a command on the head and returns what it printed."""

    def __init__(self, job_id: str, call: Callable[..., subprocess.CompletedProcess[str]]) -> None:
        self.id, self._call = job_id, call

    def facts(self) -> dict[str, str]:
        """``scontrol show job``: JobState, Reason, Restarts, ExitCode, NodeList, StdOut, RunTime …"""
        text = self._call(["scontrol", "--oneliner", "show", "job", self.id]).stdout
        found = list(_KEY.finditer(text))
        ends = [match.start() for match in found[1:]] + [len(text)]
        return {match[1]: text[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}

    @property
    def state(self) -> str:
        return self.facts()["JobState"]

    @property
    def exit_code(self) -> int:
        """Of the batch script."""
        return int(self.facts()["ExitCode"].split(":")[0])

    @property
    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    @property
    def nodes(self) -> list[str]:
        """Where it runs or ran."""
        names = self._call(["scontrol", "show", "hostnames", self.facts()["NodeList"]]).stdout
        return names.split()

    @property
    def output(self) -> str:
        """What it has written so far, stdout and stderr; of all its runs where the file was opened to append."""
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    @cached_property
    def _output(self) -> Path:
        return Path(self.facts()["StdOut"])

    def wait(self, timeout_s: float) -> str:
        """The state in which it has ended; AssertionError with its output at the limit."""
        self.wait_until(lambda: self.state in ENDED, timeout_s, "end")
        return self.state

    def wait_for(self, state: str, timeout_s: float) -> None:
        self.wait_until(lambda: self.state == state, timeout_s, f"be {state}")

    def wait_for_output(self, text: str, timeout_s: float) -> None:
        self.wait_until(lambda: text in self.output, timeout_s, f"print {text!r}")

    def wait_until(self, condition: Callable[[], object], timeout_s: float, what: str) -> None:
        """Poll ``condition``; at the limit AssertionError says that the job did not ``what``, and all that is known."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                facts = {key: self.facts().get(key) for key in ("JobState", "Reason", "Restarts", "NodeList")}
                raise AssertionError(f"job {self.id} did not {what} in {timeout_s:.0f} s: {facts}\n{self.output}")
            time.sleep(_POLL_S)

    def signal(self, name: str, *, batch: bool = False) -> None:
        """``scancel --signal``: to the steps, or with ``batch`` to the script alone."""
        self._call(["scancel", f"--signal={name}", *(["--batch"] if batch else []), self.id])

    def cancel(self) -> None:
        self._call(["scancel", self.id])

    def requeue(self) -> None:
        self._call(["scontrol", "requeue", self.id])

    def sacct(self, *fields: str) -> list[dict[str, Any]]:
        """A row for each start of the job and each of its steps, where the cluster keeps accounts."""
        lines = self._call(
            ["sacct", "--parsable2", "--duplicates", f"--jobs={self.id}", f"--format={','.join(fields)}"]
        ).stdout
        header, *rows = [line.split("|") for line in lines.splitlines()]
        return [dict(zip(header, row, strict=True)) for row in rows]
