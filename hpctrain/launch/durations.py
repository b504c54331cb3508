"""Time limits as Slurm writes them: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""

from __future__ import annotations

import re

from hpctrain.errors import UserError

_FORMS = re.compile(
    r"(?P<minutes>\d+)(?::(?P<seconds>\d+))?"
    r"|(?P<hours>\d+):(?P<h_minutes>\d+):(?P<h_seconds>\d+)"
    r"|(?P<days>\d+)-(?P<d_hours>\d+)(?::(?P<d_minutes>\d+)(?::(?P<d_seconds>\d+))?)?",
    re.ASCII,
)
_SECONDS = {"days": 86400, "hours": 3600, "minutes": 60, "seconds": 1}


def parse_duration(text: str) -> int | None:
    """The seconds of Slurm's time ``text``, or None where it is no such time (UNLIMITED, for instance)."""
    match = _FORMS.fullmatch(text)
    if match is None:
        return None
    return sum(int(value or 0) * _SECONDS[name.split("_")[-1]] for name, value in match.groupdict().items())


def seconds_of(text: str, told_by: str) -> int:
    """The same for a time that was asked for; UserError naming the option or key ``told_by`` unless it is above 0."""
    if not (seconds := parse_duration(text)):
        raise UserError(
            f"{told_by} is {text!r}, but must be a time as Slurm writes it, such as 90 (minutes), 12:00:00 or 2-00"
        )
    return seconds
