"""Image folders as users have them: ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, or class folders without split.

Classes are numbered in the order of their names, as torchvision's ImageFolder does. Nothing is ever written
into the folder, and the result of a scan is not kept: a file replaced in place would not be noticed. Large
sets are packed instead.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from hpctrain.data.header import IMAGE_SUFFIXES, BadPicture, Header, is_image_name, read_file_header
from hpctrain.data.index import RECORD
from hpctrain.data.progress import Progress
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.voice import listed

SPLITS = ("train", "val")

#: Threads of a scan. It waits for the file system; the work of Python itself is 0.1 ms a picture.
SCAN_THREADS = 16
_SCAN_CHUNK = 256
_MOST_NAMED = 3


@dataclass(frozen=True)
class Split:
    """The pictures of one split: paths and labels, sorted by class, then by name."""

    paths: list[str]
    labels: list[int]


@dataclass(frozen=True)
class Listing:
    """What an image folder holds, by file names alone. ``splits`` has "train", and "val" where there is one."""

    root: Path
    classes: tuple[str, ...]
    splits: dict[str, Split]


def list_folder(root: Path) -> Listing:
    """List an image folder; raises UserError when it has another form."""
    if not root.is_dir():
        raise UserError(f"the data folder {root} does not exist: set data.path to a packed or image folder")
    folders = _folders(root)
    if "train" in folders:
        parts = {split: root / split for split in SPLITS if split in folders}
    elif "val" in folders:
        raise UserError(f"{root} has a folder val but no folder train: add it")
    else:
        parts = {"train": root}
    classes = _classes(parts["train"])
    if "val" in parts:
        check_same_classes(classes, _classes(parts["val"]), str(root))
    return Listing(root, classes, {name: _list_split(part, classes) for name, part in parts.items()})


def check_same_classes(train: Iterable[str], val: Iterable[str], source: str) -> None:
    """Raise UserError unless both parts have the same classes."""
    missing, extra = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if missing or extra:
        names = listed(missing or extra, _MOST_NAMED)
        which = f"lacks {names}" if missing else f"has {names} beside those of train"
        raise UserError(f"the val part of {source} {which}: both parts must have the same classes")


def check_classes(classes: tuple[str, ...], source: str) -> None:
    """Raise UserError unless there are classes to tell apart."""
    if not classes:
        raise UserError(f"{source} holds no class folders: it must hold one folder of pictures a class")
    if len(classes) == 1:
        raise UserError(f"{source} holds one class only ({classes[0]}): a classifier needs two or more")


def scan(split: Split, progress: Progress, title: str) -> np.ndarray:
    """Read the header of every picture: RECORD [n] with one shard a sample.

    Raises UserError naming the first unusable picture, MachineError for one that cannot be read.
    """
    samples = np.zeros(len(split.paths), dtype=RECORD)
    samples["shard"] = np.arange(len(split.paths))
    samples["label"] = split.labels
    bad: list[tuple[str, BadPicture]] = []
    row = 0
    with ThreadPoolExecutor(SCAN_THREADS) as pool, progress(title, len(split.paths)) as advance:
        for chunk in pool.map(_scan_chunk, _chunks(split.paths)):
            for path, found in chunk:
                if isinstance(found, BadPicture):
                    bad.append((path, found))
                else:
                    header, size = found
                    record = samples[row]
                    record["length"], record["orientation"] = size, header.orientation
                    record["width"], record["height"] = header.width, header.height
                row += 1
            advance(len(chunk))
    if bad:
        path, error = bad[0]
        others = f" and {len(bad) - 1} more cannot be used" if len(bad) > 1 else ""
        raise UserError(f"{path} {error}{others}: run `hpctrain data verify` on the folder and remove what it lists")
    return samples


def _scan_chunk(paths: list[str]) -> list[tuple[str, tuple[Header, int] | BadPicture]]:
    found: list[tuple[str, tuple[Header, int] | BadPicture]] = []
    for path in paths:
        try:
            found.append((path, read_file_header(path)))
        except BadPicture as error:
            found.append((path, error))
        except OSError as error:
            raise MachineError(f"{path} cannot be read: {error.strerror}") from error
    return found


def _chunks(paths: list[str]) -> Iterator[list[str]]:
    rest = iter(paths)
    while chunk := list(islice(rest, _SCAN_CHUNK)):
        yield chunk


def _folders(path: Path) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give yourself the right to") from error


def _classes(part: Path) -> tuple[str, ...]:
    classes = tuple(_folders(part))
    check_classes(classes, str(part))
    return classes


def _list_split(part: Path, classes: tuple[str, ...]) -> Split:
    split = Split([], [])
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for label, paths in enumerate(pool.map(_pictures, [part / name for name in classes])):
            split.paths.extend(paths)
            split.labels.extend([label] * len(paths))
    return split


def _pictures(folder: Path) -> list[str]:
    """Paths of the pictures of one class, sorted by name."""
    if nested := _folders(folder):
        raise UserError(f"{folder} holds the folder {nested[0]}: pictures must lie directly in their class folder")
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if is_image_name(entry.name))
    if not names:
        endings = ", ".join(IMAGE_SUFFIXES)
        raise UserError(f"the class folder {folder} holds no pictures ({endings}): fill it or remove it")
    return [os.path.join(folder, name) for name in names]
