"""Names of samples, and the part of a data set that is held out for validation by name.

Whether a picture is held out depends on its class and file name and on the names of its class, on nothing
else: not on seed, run, number of ranks or on whether the set is packed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import PurePosixPath

import numpy as np

from hpctrain.errors import UserError

_NAME_LENGTH = 60


def safe_name(name: str) -> str:
    """A name fit for a WebDataset key: ASCII letters, digits, _ and - alone, at most 60 characters."""
    return re.sub(r"[^A-Za-z0-9_\-]", "_", name)[:_NAME_LENGTH]


def safe_stem(file_name: str) -> str:
    """``safe_name`` of a file's name without its ending."""
    return safe_name(PurePosixPath(file_name).stem)


def sample_key(position: int, file_name: str) -> str:
    """WebDataset key of the sample at ``position`` of its split; unique by that number."""
    return f"{position:08d}-{safe_stem(file_name)}"


def stem_of_key(member_name: str) -> str:
    """The ``safe_stem`` in the name of a member that was called by ``sample_key``."""
    return PurePosixPath(member_name).stem.split("-", 1)[1]


def name_hash(class_name: str, stem: str) -> int:
    """64 bits drawn from a sample's class and ``safe_stem``."""
    return int.from_bytes(hashlib.blake2b(f"{class_name}/{stem}".encode(), digest_size=8).digest(), "big")


def hold_out(hashes: Sequence[int] | np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Which of n samples are held out: bool [n], about ``fraction`` of them.

    A sample is held out when its hash is in the lowest ``fraction`` of all 64-bit numbers. In a class of two
    pictures or more the one with the lowest hash always is and the one with the highest never is, so that no
    class is missing from either part; a class of one picture is in one part only.

    Raises UserError when one of the parts would be empty.
    """
    values = np.asarray(hashes, dtype=np.uint64)
    held = values < np.uint64(int(fraction * 2**64))
    order = np.lexsort((np.arange(len(values)), values, labels))
    ordered = labels[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    last = np.r_[first[1:], len(ordered)] - 1
    several = last > first
    held[order[first[several]]] = True
    held[order[last[several]]] = False
    if held.all() or not held.any():
        raise UserError(
            f"data.val_fraction={fraction} leaves a part of these {len(values)} pictures empty: choose another"
        )
    return held
