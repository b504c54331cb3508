"""Bytes of samples by id: positional reads from a bounded set of open files.

It returns files as they are stored; decoding belongs to the loaders.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

from hpctrain.data.index import Index
from hpctrain.errors import MachineError

#: Open shards kept by one reader. A shuffle window touches a few dozen of them.
MAX_OPEN_FILES = 128


class _OpenFile:
    """A descriptor that is closed when the last reader lets go of it, so that eviction never cuts a read short."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset``, or fewer at the end of the file."""
        data = os.pread(self.descriptor, length, offset)
        while len(data) < length:  # network file systems may return less than was asked for
            more = os.pread(self.descriptor, length - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class SampleReader:
    """Reads samples of one index. Safe to use from several threads at once."""

    def __init__(self, index: Index, max_open_files: int = MAX_OPEN_FILES) -> None:
        self._index = index
        self._max_open_files = max_open_files
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, sample_ids: Sequence[int] | np.ndarray) -> list[bytes]:
        """The encoded pictures of ``sample_ids``, in that order.

        Raises MachineError naming the file when one cannot be read or is shorter than its index says.
        """
        return [self._read_one(record) for record in self._index.samples[np.asarray(sample_ids, dtype=np.int64)]]

    def close(self) -> None:
        """Close all files. The reader may be used again: it opens them anew."""
        with self._lock:
            self._files.clear()

    def _read_one(self, record: np.void) -> bytes:
        shard, offset, length = int(record["shard"]), int(record["offset"]), int(record["length"])
        path = self._index.shards[shard]
        try:
            # A file that is one sample is read once an epoch: keeping it open would only push out shards.
            data = (self._open(shard) if offset else _OpenFile(path)).read(offset, length)
        except OSError as error:
            raise MachineError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) < length:
            raise MachineError(f"{path} ends at byte {offset + len(data)}, its index says {offset + length} or more")
        return data

    def _open(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._files.pop(shard, None) or _OpenFile(self._index.shards[shard])
            self._files[shard] = file
            if len(self._files) > self._max_open_files:
                self._files.popitem(last=False)
        return file
