"""Where every sample of a split lies: a table of (shard, offset, length, label, size, orientation).

A sample id is a row of this table. The index neither reads pictures (``hpctrain.data.reader``) nor decides
their order (``hpctrain.data.sampler``). On disk it is a plain .npy file, memory-mapped when it is opened.
"""

from __future__ import annotations

import os
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hpctrain.errors import UserError

#: One sample. ``shard`` counts in ``Index.shards``; ``offset`` and ``length`` in bytes within that file;
#: ``width`` and ``height`` in pixels of the upright picture; ``orientation`` is its EXIF tag, 1 when absent.
RECORD = np.dtype(
    [
        ("shard", "<u4"),
        ("offset", "<u8"),
        ("length", "<u4"),
        ("label", "<i4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("orientation", "u1"),
    ]
)

TAR_BLOCK_BYTES = 512


@dataclass(frozen=True, eq=False)
class Index:
    """The samples of one split.

    ``samples`` [n] of RECORD; ``shards`` are absolute paths: tar files, or the pictures themselves, one a
    sample at offset 0 (the data of a tar member never start there); ``classes`` by label.
    """

    samples: np.ndarray
    shards: tuple[str, ...]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def labels(self) -> np.ndarray:
        """Labels [n] int64, by sample id."""
        return self.samples["label"].astype(np.int64)

    def select(self, ids: np.ndarray) -> Index:
        """The index of the samples ``ids`` [m], in that order; they are renumbered 0 … m - 1."""
        return Index(np.asarray(self.samples[ids]), self.shards, self.classes)

    def name(self, sample_id: int) -> str:
        """What to call a sample in a message: "shard.tar:member", or the path of its file."""
        record = self.samples[sample_id]
        path, offset = str(self.shards[record["shard"]]), int(record["offset"])
        if offset == 0:
            return path
        try:
            return f"{path}:{read_member(path, offset).name}"
        except (OSError, tarfile.HeaderError):
            # A name is asked for when something is wrong already: then the place has to do.
            return f"{path}:(byte {offset})"


def read_member(path: str, offset: int) -> tarfile.TarInfo:
    """Header of the member of tar file ``path`` whose data start at byte ``offset``.

    Raises OSError when the file cannot be read, tarfile.HeaderError when no header precedes the data.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        block = os.pread(descriptor, TAR_BLOCK_BYTES, offset - TAR_BLOCK_BYTES)
    finally:
        os.close(descriptor)
    return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")


def load_samples(path: Path) -> np.ndarray:
    """Memory-map the RECORD table [n] in ``path``; raises UserError when the file holds anything else."""
    try:
        samples: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: pack the data set again") from None
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path} cannot be read as an index ({error}): pack the data set again") from error
    if samples.dtype != RECORD or samples.ndim != 1:
        raise UserError(f"{path} is not an index of this version of hpctrain: pack the data set again")
    return samples


def check_samples(samples: np.ndarray, shard_bytes: np.ndarray, num_classes: int, source: str) -> None:
    """Raise UserError unless every record lies within its shard and has a known label.

    ``shard_bytes`` [shards] are the shards' sizes; ``source`` names the index in the message.
    """
    remedy = "pack the data set again"
    if len(samples) == 0:
        raise UserError(f"{source} lists no samples: {remedy}")
    if int(samples["shard"].max()) >= len(shard_bytes):
        raise UserError(f"{source} names shard {int(samples['shard'].max())} of {len(shard_bytes)}: {remedy}")
    labels = samples["label"]
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise UserError(f"{source} has labels outside 0 … {num_classes - 1}: {remedy}")
    ends = samples["offset"] + samples["length"]
    outside = np.flatnonzero((samples["length"] == 0) | (ends > shard_bytes[samples["shard"]].astype(np.uint64)))
    if outside.size:
        raise UserError(f"{source} places sample {outside[0]} outside its shard: {remedy}")
