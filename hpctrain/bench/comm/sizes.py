"""Message sizes: as they are typed, as they are told, and the ladder between the smallest and the largest."""

from __future__ import annotations

import re

from hpctrain.errors import UserError

#: what a smallest message must hold; below it engines send headers
MIN_BYTES = 8
#: between neighbours on the ladder
FACTOR = 4

_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_BY_LOWER_CASE = {unit.lower(): factor for unit, factor in _UNITS.items()} | {"": 1}


def parse_size(option: str, text: str) -> int:
    """Bytes of ``text``, a whole number with B, KiB, MiB or GiB (1,024 each) or without a unit.

    Raises UserError that names ``option``.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([a-z]*)\s*", text.lower())
    if match is None or match[2] not in _BY_LOWER_CASE:
        raise UserError(
            f"{option} is {text!r}, which is no size: write a whole number with B, KiB, MiB or GiB, as 64KiB"
        )
    return int(match[1]) * _BY_LOWER_CASE[match[2]]


def ladder(smallest: str, largest: str) -> list[int]:
    """Sizes in bytes, each ``FACTOR`` times the one before, from ``--min-size`` to ``--max-size``, which is the last.

    Raises UserError for what is no size, for less than ``MIN_BYTES``, and when the smallest is above the largest.
    """
    low, high = parse_size("--min-size", smallest), parse_size("--max-size", largest)
    if low < MIN_BYTES:
        raise UserError(f"--min-size is {tell(low)}, but the smallest message is {tell(MIN_BYTES)}: raise it")
    if low > high:
        raise UserError(f"--min-size is {tell(low)}, above --max-size, which is {tell(high)}: swap them")
    sizes = []
    while low < high:
        sizes.append(low)
        low *= FACTOR
    return [*sizes, high]


def tell(size_bytes: int) -> str:
    """``size_bytes`` in the largest unit that leaves a whole number: 8 B, 64 KiB."""
    unit = next(unit for unit in reversed(_UNITS) if size_bytes % _UNITS[unit] == 0)
    return f"{size_bytes // _UNITS[unit]} {unit}" if size_bytes else "0 B"
