"""Files of KEY=VALUE lines that a shell may source and that mean the same when read here: nothing in them is executed.

The common ground of the two is small on purpose; what lies outside of it is an error that names file and line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hpctrain.errors import UserError

_VARIABLE = r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})"
_PLAIN = rf"(?:[\w./:,@%+=^-]|{_VARIABLE})*"
_DOUBLE = rf'"(?:[^"\\$`]|{_VARIABLE})*"'
_SINGLE = r"'[^']*'"
_BLANK = r"[ \t]"
_LINE = re.compile(
    rf"{_BLANK}*(?:(?:export{_BLANK}+)?(?P<key>[A-Za-z_]\w*)="
    rf"(?:(?P<single>{_SINGLE})|(?P<double>{_DOUBLE})|(?P<plain>{_PLAIN})))?"
    rf"{_BLANK}*(?:(?:^|(?<={_BLANK}))#.*)?",
    re.ASCII,
)


class Entry(NamedTuple):
    """A value, and the line (from 1) that gives it."""

    value: str
    line: int


def read_env(path: Path, environ: Mapping[str, str]) -> dict[str, Entry]:
    """The values in ``path`` by key; ``$NAME`` stands for the file's own or the environment's value.

    A name that neither knows stays as it is written: a job may know it. Raises UserError when the file cannot be
    read, at a line that is no KEY=VALUE, and at a key that is given twice.
    """
    try:
        text = path.read_bytes().decode()
    except FileNotFoundError:
        raise UserError(f"there is no site file {path}: copy slurm/sites/template.env there and fill it in") from None
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"the site file {path} cannot be read ({reason}): give a readable one with --site") from None
    entries: dict[str, Entry] = {}
    for number, line in enumerate(text.split("\n"), start=1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise UserError(f"{path}:{number}: {_wrong(line)}")
        if (key := match["key"]) is None:
            continue
        if key in entries:
            raise UserError(f"{path}:{number}: {key} is already set on line {entries[key].line}: leave one of them out")
        known = {**environ, **{name: entry.value for name, entry in entries.items()}}
        entries[key] = Entry(_value(match, known), number)
    return entries


def _wrong(line: str) -> str:
    if line.endswith("\r"):
        return (
            "the line ends as on Windows, and a shell would take the carriage return for a part of the value: give the "
            "file Unix line ends (dos2unix)"
        )
    return (
        f"{line.strip()!r} is not KEY=VALUE: put a value with blanks between quotes, "
        "and leave commands and backslashes out"
    )


def _value(match: re.Match[str], known: Mapping[str, str]) -> str:
    if match["single"] is not None:
        return match["single"][1:-1]
    text = match["plain"] if match["double"] is None else match["double"][1:-1]
    return re.sub(_VARIABLE, lambda name: known.get(name[0].strip("${}"), name[0]), text, flags=re.ASCII)
