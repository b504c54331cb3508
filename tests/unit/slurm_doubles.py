"""Stand-ins for Slurm's commands on PATH: each writes down how it was called, answers, and leaves as it was told."""

from __future__ import annotations

import shlex
from pathlib import Path


class Calls:
    """How the program ``name`` in ``folder`` was called."""

    def __init__(self, folder: Path, name: str) -> None:
        self._called, self._environment = folder / f"{name}.argv", folder / f"{name}.environ"

    @property
    def calls(self) -> list[list[str]]:
        """The arguments of each call, without the program's name. They end with an empty one, so none may be empty."""
        if not self._called.exists():
            return []
        calls: list[list[str]] = [[]]
        for argument in self._called.read_bytes().decode().split("\0")[:-1]:
            if argument:
                calls[-1].append(argument)
            else:
                calls.append([])
        return calls[:-1]

    @property
    def environ(self) -> dict[str, str]:
        """The environment of the last call."""
        pairs = self._environment.read_bytes().decode().split("\0")[:-1]
        return dict(pair.split("=", 1) for pair in pairs)


class Double(Calls):
    """A program ``name`` in ``folder``. ``stdout`` and ``stderr`` are what it says, ``status`` how it leaves.

    ``first`` is a line of bash that comes before all of that, ``then`` one that comes before it leaves.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        stdout: str = "",
        stderr: str = "",
        status: int = 0,
        then: str = "",
        first: str = "",
    ) -> None:
        super().__init__(folder, name)
        script = f"""#!/bin/bash
{first}
printf '%s\\0' "$@" '' >>{shlex.quote(str(self._called))}
env -0 >{shlex.quote(str(self._environment))}
printf %s {shlex.quote(stdout)}
printf %s {shlex.quote(stderr)} >&2
{then}
exit {status}
"""
        path = folder / name
        path.write_text(script)
        path.chmod(0o755)
