"""Everything that can be wrong with one picture, found by decoding it whole; ``verify`` sums it up."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache

from hpctrain.data.header import BadPicture, decode, read_header
from hpctrain.data.sources import Entry, read_range
from hpctrain.data.split import safe_name, safe_stem, stem_of_key
from hpctrain.errors import HpctrainError

_SEPARATORS = re.compile(r"[_\- ]")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about one picture or shard; ``kind`` sorts it, ``detail`` completes "NAME …"."""

    kind: str
    name: str
    detail: str


@dataclass(frozen=True, slots=True)
class Examined:
    """``problems`` need mending, ``notes`` do not; ``digest`` of the bytes tells equal pictures."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    digest: bytes


def examine(entry: Entry, name: str, classes: tuple[str, ...]) -> Examined:
    """Read and decode one picture. It is called ``name`` in what is found."""
    try:
        data = read_range(entry)
    except HpctrainError as error:
        return Examined((Finding("unreadable", name, f"cannot be read: {error}"),), (), b"")
    problems, notes = [], []
    if other := named_class(entry, classes):
        problems.append(Finding("mislabelled", name, f"is named after class {other} but lies in another"))
    try:
        header = read_header(data)
        decode(data)
    except BadPicture as error:
        problems.append(Finding(error.fault, name, str(error)))
    else:
        if header.mode == "CMYK":
            problems.append(Finding("cmyk", name, "is in CMYK: convert it to RGB"))
        if header.mode in ("L", "LA", "1", "I", "I;16"):
            notes.append(Finding("grey", name, "is grey"))
        if (header.format == "png") != name.lower().endswith(".png"):
            notes.append(Finding("ending", name, f"is a {header.format.upper()} by its contents"))
    return Examined(tuple(problems), tuple(notes), hashlib.blake2b(data, digest_size=16).digest() if data else b"")


def named_class(entry: Entry, classes: tuple[str, ...]) -> str | None:
    """The class other than its own that a picture's name starts with, as n01440764_12.JPEG does, or None.

    Classes called by bare numbers are passed over: there a leading number may be any.
    """
    stem = safe_stem(entry.name) if entry.offset == 0 else stem_of_key(entry.name)
    if stem.startswith(safe_name(classes[entry.label])):
        return None
    by_name = _classes_by_safe_name(classes)
    starts = [stem[: found.start()] for found in _SEPARATORS.finditer(stem)]
    named = [by_name[start] for start in starts if start in by_name]
    return named[-1] if named else None


@lru_cache(maxsize=1)
def _classes_by_safe_name(classes: tuple[str, ...]) -> dict[str, str]:
    return {safe_name(name): name for name in classes if not name.isdigit()}
