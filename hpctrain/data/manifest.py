"""dataset.json: what a packed folder holds. Read here with every check that is cheap enough for each start of a run.

The digests of whole shards are compared by ``hpctrain data verify``, which reads them to their end.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hpctrain.data.folder import check_classes
from hpctrain.data.index import Index, check_samples, load_samples, read_member
from hpctrain.errors import UserError

MANIFEST_NAME = "dataset.json"
SCHEMA: Final = "hpctrain-dataset-1"

#: Holds what a pack needs to be resumed; gone when it is complete.
WORK_FOLDER_NAME = ".packing"

_REMEDY = "run `hpctrain data pack` again into a new folder"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Part):
    """One tar file; ``sha256`` over all of it."""

    name: str
    bytes: int
    samples: int
    sha256: str


class PackedSplit(_Part):
    """One split: its shards, in the order of sample ids, and the digest of its index file."""

    samples: int
    shards: tuple[Shard, ...]
    index_sha256: str


class Manifest(_Part):
    """The whole set. ``fingerprint`` is that of the input and options it was packed from;
    ``corrupt_left_out`` names the pictures of the input that are not in it."""

    schema_: Literal["hpctrain-dataset-1"] = Field(alias="schema")
    classes: tuple[str, ...]
    splits: dict[str, PackedSplit]
    corrupt_left_out: tuple[str, ...] = ()
    fingerprint: str


def index_path(folder: Path, split: str) -> Path:
    """Where the index of a split lies in a packed folder."""
    return folder / f"{split}.index.npy"


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_packed(path: Path) -> bool:
    """Whether a folder is one that ``hpctrain data pack`` made or began."""
    return (path / MANIFEST_NAME).exists() or (path / WORK_FOLDER_NAME).exists()


def read_manifest(folder: Path) -> Manifest:
    """Read dataset.json; raises UserError when it is missing, unreadable or of another schema."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise UserError(f"{folder} was not packed to its end: run the same `hpctrain data pack` again to finish it")
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict) and found.get("schema") != SCHEMA:
            raise UserError(f"{path} has schema {found.get('schema')!r} where {SCHEMA!r} is wanted: {_REMEDY}")
        manifest = Manifest.model_validate(found)
    except (OSError, ValueError, ValidationError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}): {_REMEDY}") from error
    check_classes(manifest.classes, str(folder))
    return manifest


def open_packed(folder: Path) -> dict[str, Index]:
    """The index of every split of a packed folder.

    Raises UserError where a shard is missing or has another size than dataset.json says, where an index has
    another digest or number of samples, or where its first and last sample of a shard are not found there.
    """
    manifest = read_manifest(folder)
    return {name: open_split(folder, name, split, manifest.classes) for name, split in manifest.splits.items()}


def open_split(folder: Path, name: str, split: PackedSplit, classes: tuple[str, ...]) -> Index:
    """The index of one split, checked as ``open_packed`` says."""
    for shard in split.shards:
        check_shard_size(folder / shard.name, shard)
    path = index_path(folder, name)
    samples = load_samples(path)
    check_index_digest(path, split)
    counts = np.bincount(samples["shard"], minlength=len(split.shards))
    if counts.tolist() != [shard.samples for shard in split.shards]:
        raise UserError(f"{path} and {folder / MANIFEST_NAME} disagree about the samples of each shard: {_REMEDY}")
    check_samples(samples, np.array([shard.bytes for shard in split.shards]), len(classes), str(path))
    index = Index(samples, tuple(str(folder / shard.name) for shard in split.shards), classes)
    ends = np.cumsum(counts) - 1
    for sample_id in np.unique(np.r_[ends - counts + 1, ends][np.r_[counts, counts] > 0]):
        find_member(index, int(sample_id))
    return index


def check_shard_size(path: Path, shard: Shard) -> None:
    """Raise UserError unless the shard is there in its full length."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read ({error.strerror}): copy it again, or {_REMEDY}") from error
    if size != shard.bytes:
        kind = "truncated" if size < shard.bytes else "too long"
        raise UserError(f"the shard {path} is {kind}, {size} of {shard.bytes} bytes: copy it again, or {_REMEDY}")


def check_index_digest(path: Path, split: PackedSplit) -> None:
    """Raise UserError unless the index file is the one that was packed."""
    if file_sha256(path) != split.index_sha256:
        raise UserError(f"{path} is not the index that belongs to its shards (its digest differs): {_REMEDY}")


def find_member(index: Index, sample_id: int) -> tarfile.TarInfo:
    """The tar header of a sample; raises UserError unless one of the right length precedes its data."""
    record = index.samples[sample_id]
    path, offset = index.shards[record["shard"]], int(record["offset"])
    try:
        member = read_member(path, offset)
    except (OSError, tarfile.HeaderError):
        member = None
    if member is None or member.size != record["length"]:
        raise UserError(f"{path} does not hold sample {sample_id} where its index says (byte {offset}): {_REMEDY}")
    return member
