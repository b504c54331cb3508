"""What can be packed: a list of pictures, each with its split, class, name and place, and a way to read one.

Nothing is read here but names and sizes. Order and contents of a listing depend on the source alone.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from hpctrain.data.folder import SCAN_THREADS, check_classes, check_same_classes, list_folder
from hpctrain.data.header import IMAGE_SUFFIXES, is_image_name
from hpctrain.errors import MachineError, UserError


@dataclass(frozen=True, slots=True)
class Entry:
    """One picture to be packed.

    ``path`` and ``offset`` say where its ``length`` bytes lie. Where a source makes the bytes (IDX, digits),
    ``offset`` is its own number for the picture and ``length`` an estimate.
    """

    split: str
    label: int
    name: str
    path: str
    offset: int
    length: int


@dataclass(frozen=True)
class Source:
    """A data set to be packed. ``read`` returns the bytes of one entry; called from several threads."""

    description: str
    classes: tuple[str, ...]
    entries: list[Entry]
    read: Callable[[Entry], bytes] = field(repr=False)

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits it has, train first."""
        return tuple(sorted({entry.split for entry in self.entries}))

    def place(self, entry: Entry) -> str:
        """Where an entry lies within the source, for messages."""
        split = f"{entry.split}/" if len(self.splits) > 1 else ""
        return f"{split}{self.classes[entry.label]}/{entry.name}"


def read_range(entry: Entry) -> bytes:
    """The bytes of an entry that is a piece of a file.

    Raises MachineError when they cannot be read, UserError when the file is shorter than at listing time.
    """
    try:
        with open(entry.path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), entry.length, entry.offset)
            while data and len(data) < entry.length:
                more = os.pread(file.fileno(), entry.length - len(data), entry.offset + len(data))
                if not more:
                    break
                data += more
    except OSError as error:
        raise MachineError(f"{entry.path} cannot be read: {error.strerror}") from error
    if len(data) != entry.length:
        raise UserError(f"{entry.path} became shorter while it was packed: leave it alone and pack again")
    return data


def folder_source(root: Path) -> Source:
    """The pictures of an image folder."""
    listing = list_folder(root)
    entries = []
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        for name, split in listing.splits.items():
            for path, label, size in zip(split.paths, split.labels, pool.map(_size, split.paths), strict=True):
                entries.append(Entry(name, label, os.path.basename(path), path, 0, size))
    return Source(str(root), listing.classes, entries, read_range)


def tar_source(path: Path) -> Source:
    """The pictures of a tar archive (not compressed) of an image folder, read in place."""
    members = sorted(member for member in tar_members(path) if is_image_name(os.path.basename(member[0])))
    if not members:
        raise UserError(f"{path} holds no pictures ({', '.join(IMAGE_SUFFIXES)}): give a tar of an image folder")
    places = [PurePosixPath(name).parts for name, _, _ in members]
    splits = _splits(path, places)
    names = {split: sorted({parts[-2] for parts in places if splits[parts[:-2]] == split}) for split in splits.values()}
    classes = tuple(names["train"])
    check_classes(classes, str(path))
    if "val" in names:
        check_same_classes(classes, names["val"], str(path))
    labels = {name: label for label, name in enumerate(classes)}
    entries = [
        Entry(splits[parts[:-2]], labels[parts[-2]], parts[-1], str(path), offset, size)
        for parts, (_, offset, size) in zip(places, members, strict=True)
    ]
    return Source(str(path), classes, entries, read_range)


def tar_members(path: Path) -> Iterator[tuple[str, int, int]]:
    """Name, offset of its data and length of each regular file of a tar archive.

    Raises UserError where the archive is cut short or holds links in place of files.
    """
    try:
        end = path.stat().st_size
        with tarfile.open(path, "r:") as archive:
            yield from members_of(archive, str(path), end)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a whole tar archive ({error}): fetch it again") from error
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}") from error


def members_of(archive: tarfile.TarFile, source: str, end: int) -> Iterator[tuple[str, int, int]]:
    """Name, offset of its data and length of each regular file of an open archive that lies before byte ``end``.

    Raises tarfile.ReadError where the archive has no end mark: tarfile itself takes the first header that it
    cannot read for the end, and so would lose the rest without a word.
    """
    while (member := archive.next()) is not None:
        if member.islnk() or member.issym():
            raise UserError(f"{source} holds {member.name} as a link: make it again with `tar --hard-dereference -h`")
        if member.offset_data + member.size > end:
            raise tarfile.ReadError(f"cut short within {member.name}")
        if member.isreg():
            yield member.name, member.offset_data, member.size
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every header it has seen: a gigabyte for ImageNet's
    archive.fileobj.seek(archive.offset)
    if archive.offset + tarfile.BLOCKSIZE > end or archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end mark where one should be, at byte {archive.offset}")


def _splits(path: Path, places: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Which split each parent of class folders is: "train" for a single one, by name where there are two."""
    for parts in places:
        if len(parts) < 2:
            raise UserError(f"{path} holds {parts[-1]} outside a class folder: give a tar of an image folder")
    parents = sorted({parts[:-2] for parts in places})
    if len(parents) == 1:
        return {parents[0]: "train"}
    if [parent[-1:] for parent in parents] == [("train",), ("val",)] and parents[0][:-1] == parents[1][:-1]:
        return {parents[0]: "train", parents[1]: "val"}
    found = ", ".join("/".join(parent) or "its top" for parent in parents[:4])
    raise UserError(f"{path} holds class folders in {found}: it must hold them in one folder, or in train and val")


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise MachineError(f"{path} cannot be read: {error.strerror}") from error
