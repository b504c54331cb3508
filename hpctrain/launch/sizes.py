"""Sizes as Slurm writes them, a number and one of the letters K, M, G, T and P, such as 480G or 1.50G."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<letter>[KMGTP]?)", re.ASCII)
_LETTERS = "KMGTP"


def parse_size(text: str, base: int) -> int | None:
    """The number that ``text`` stands for, each letter being ``base`` times the one before; None for any other text."""
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    power = _LETTERS.index(match["letter"]) + 1 if match["letter"] else 0
    return round(float(match["number"]) * float(base) ** power)
