"""Slurm's commands, called with lists of arguments and never by a shell."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping, Sequence

from hpctrain.errors import MachineError, UserError

_TIMEOUT_S = 60.0
#: what Slurm's commands say when nobody answers them
_UNREACHABLE = (
    "Unable to contact",
    "timed out",
    "Connection refused",
    "Zero Bytes were transmitted",
    "in standby mode",
)


class SlurmRefusal(UserError):
    """Slurm was asked and said no; the text is its own reason, in its own words."""


def ask_slurm(argv: Sequence[str], environ: Mapping[str, str], timeout_s: float = _TIMEOUT_S) -> str:
    """What the command prints.

    Raises SlurmRefusal with the command's reason, UserError where there is no such command, MachineError where
    Slurm's controller does not answer.
    """
    try:
        done = subprocess.run(
            argv, env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"{argv[0]} is not on PATH: run this on a login node of a Slurm cluster, or load the module that has it"
        ) from None
    except subprocess.TimeoutExpired:
        raise MachineError(f"{shlex.join(argv[:2])}: no answer from Slurm within {timeout_s:g} s") from None
    if done.returncode == 0:
        return done.stdout
    reason = _reason(argv[0], done.stderr) or f"{argv[0]} exited with status {done.returncode} and printed nothing"
    if any(phrase in done.stderr for phrase in _UNREACHABLE):
        raise MachineError(f"Slurm's controller does not answer ({reason}): see `scontrol ping`")
    raise SlurmRefusal(reason)


def _reason(command: str, stderr: str) -> str:
    """The last line of ``stderr`` without the marks that Slurm's commands put before it."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    return lines[-1].removeprefix(f"{command}: ").removeprefix("error: ").rstrip(".") if lines else ""
