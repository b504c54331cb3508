"""Writing one shard: a WebDataset tar whose bytes depend on the samples alone.

Each sample is two members, ``<key>.jpg`` (or .png, by its contents) and ``<key>.cls`` with the label in
decimal. Owner, time and mode are fixed, so equal samples give equal files.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from hpctrain.data.header import Header
from hpctrain.data.index import RECORD
from hpctrain.data.manifest import Shard
from hpctrain.errors import MachineError

_BLOCK_BYTES = tarfile.BLOCKSIZE
_LABEL_BYTES = 2 * _BLOCK_BYTES
_ENDINGS = {"jpeg": "jpg", "png": "png"}


def sample_bytes(length: int) -> int:
    """Space that a picture of ``length`` bytes and its label take in a shard."""
    return _BLOCK_BYTES + -(-length // _BLOCK_BYTES) * _BLOCK_BYTES + _LABEL_BYTES


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the disk answers into a MachineError that names ``path``."""
    try:
        yield
    except OSError as error:
        remedy = ": make room and run again, it goes on where it stopped" if error.errno == errno.ENOSPC else ""
        raise MachineError(f"{path} cannot be written ({error.strerror}){remedy}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file so that it is there whole or not at all. Raises MachineError."""
    partial = path.with_name(path.name + ".partial")
    with writing(path):
        try:
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


class ShardWriter:
    """One shard under way, at ``partial``; ``finish`` gives it its name, anything else leaves no shard.

    Raises MachineError when it cannot be written.
    """

    def __init__(self, path: Path, partial: Path) -> None:
        self._path, self._partial = path, partial
        self._records: list[tuple[int, ...]] = []
        with writing(path):
            self._file = _HashedFile(partial)
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)  # type: ignore[arg-type]

    def add(self, key: str, data: bytes, header: Header, label: int) -> None:
        """Append one sample."""
        with writing(self._path):
            self._add_member(f"{key}.{_ENDINGS[header.format]}", data)
            offset = self._tar.offset - -(-len(data) // _BLOCK_BYTES) * _BLOCK_BYTES
            self._add_member(f"{key}.cls", str(label).encode())
        self._records.append((0, offset, len(data), label, header.width, header.height, header.orientation))

    def finish(self) -> tuple[Shard, np.ndarray]:
        """Close the shard under its final name; its description and its records, with ``shard`` 0."""
        with writing(self._path):
            self._tar.close()
            size = self._file.tell()
            self._file.sync_and_close()
            os.replace(self._partial, self._path)
        shard = Shard(name=self._path.name, bytes=size, samples=len(self._records), sha256=self._file.digest)
        return shard, np.array(self._records, dtype=RECORD)

    def abandon(self) -> None:
        """Close and remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def _add_member(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(data), 0o644
        self._tar.addfile(member, io.BytesIO(data))


class _HashedFile:
    """A file that is written once, from start to end, and digested on the way."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by the writer that owns it
        self._sha256 = hashlib.sha256()
        self._size = 0

    @property
    def digest(self) -> str:
        return self._sha256.hexdigest()

    def write(self, data: bytes) -> int:
        self._sha256.update(data)
        self._size += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._size

    def sync_and_close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        with suppress(OSError):  # closing flushes: on a full disk that fails once more, and the file is removed next
            self._file.close()
