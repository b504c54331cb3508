"""Packing a listed data set into WebDataset shards with an index; resumable and reproducible.

Pictures are copied byte for byte. Their order mixes the classes and depends on their names alone, and so do
the limits of the shards: the same input gives the same bytes, whatever the number of jobs and however often
packing was broken off. Each finished shard is recorded with its digest; a later run with the same input goes
on at the first that is missing. Headers are checked here; errors within a picture are found by
``hpctrain data verify``.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpctrain.data.header import BadPicture, check_end, read_header
from hpctrain.data.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    WORK_FOLDER_NAME,
    Manifest,
    PackedSplit,
    Shard,
    file_sha256,
    index_path,
    is_packed,
    read_manifest,
)
from hpctrain.data.progress import Progress, show_progress
from hpctrain.data.shard import ShardWriter, sample_bytes, write_whole, writing
from hpctrain.data.sources import Entry, Source
from hpctrain.data.split import name_hash, sample_key
from hpctrain.errors import MachineError, UserError

#: In the work folder: which pack it belongs to.
PLAN_NAME = "plan.json"

DEFAULT_SHARD_MB = 256
DEFAULT_JOBS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class PackOptions:
    """``shard_mb``: size of a shard in MB (10^6 bytes); ``jobs``: shards written at once; ``skip_corrupt``:
    leave out pictures that are empty, cut short or no pictures, instead of refusing the set for them."""

    shard_mb: float = DEFAULT_SHARD_MB
    jobs: int = DEFAULT_JOBS
    skip_corrupt: bool = False


@dataclass(frozen=True)
class PackResult:
    """What a packed folder holds, and what this run did for it."""

    destination: Path
    samples: dict[str, int]
    num_classes: int
    num_shards: int
    size_bytes: int
    corrupt: tuple[str, ...]
    packed_now: int
    seconds: float

    def summary(self) -> str:
        """One sentence for the user."""
        parts = " and ".join(f"{count:,} {split}" for split, count in self.samples.items())
        left_out = f", {len(self.corrupt)} corrupt ones left out" if self.corrupt else ""
        rate = f" at {self.packed_now / self.seconds:,.0f} images/s" if self.packed_now else ""
        return (
            f"{self.destination} holds {parts} pictures of {self.num_classes} classes in {self.num_shards} shards "
            f"({self.size_bytes / 1e6:,.1f} MB){left_out}; "
            f"{self.packed_now:,} packed now in {self.seconds:.1f} s{rate}."
        )


@dataclass(frozen=True)
class _ShardPlan:
    """One shard to be written: the entries at positions ``first`` and on of its split's order."""

    name: str
    split: str
    first: int
    entries: list[Entry]


def pack_source(
    source: Source, destination: Path, options: PackOptions | None = None, progress: Progress = show_progress
) -> PackResult:
    """Write ``source`` to ``destination`` as shards, indexes and dataset.json.

    Raises UserError where the destination holds something else or pictures are corrupt (unless they are to be
    skipped), MachineError naming the file when the disk fails.
    """
    options = options or PackOptions()
    start = time.perf_counter()
    plans = _plan(source, int(options.shard_mb * 1e6))
    fingerprint = _fingerprint(source, plans)
    _claim(destination, fingerprint)
    todo: list[_ShardPlan] = []
    if not (destination / MANIFEST_NAME).exists():
        with _alone(destination):
            todo = [plan for plan in plans if not _is_done(destination, plan)]
            _write_shards(source, destination, todo, options.jobs, progress)
            _finish(source, destination, plans, fingerprint, options.skip_corrupt)
    shutil.rmtree(destination / WORK_FOLDER_NAME, ignore_errors=True)
    return _result(destination, sum(len(plan.entries) for plan in todo), time.perf_counter() - start)


def _plan(source: Source, shard_bytes: int) -> list[_ShardPlan]:
    """Divide each split into shards. Known sizes decide, so that the limits do not depend on what is read later."""
    plans: list[_ShardPlan] = []
    for split in source.splits:
        entries = [entry for entry in source.entries if entry.split == split]
        entries.sort(key=lambda entry: (name_hash(source.classes[entry.label], entry.name), entry.label, entry.name))
        filled = shard_bytes
        for position, entry in enumerate(entries):
            needed = sample_bytes(entry.length)
            if filled + needed > shard_bytes:
                number = sum(plan.split == split for plan in plans)
                plans.append(_ShardPlan(f"{split}-{number:06d}.tar", split, position, []))
                filled = 0
            plans[-1].entries.append(entry)
            filled += needed
    return plans


def _fingerprint(source: Source, plans: list[_ShardPlan]) -> str:
    """Digest of everything the packed bytes follow from, save the contents of the pictures."""
    digest = hashlib.sha256(json.dumps([SCHEMA, source.classes]).encode())
    for plan in plans:
        digest.update(f"\0{plan.name}".encode())
        for entry in plan.entries:
            digest.update(f"\0{entry.label}/{entry.name}/{entry.length}".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _claim(destination: Path, fingerprint: str) -> None:
    """Take the destination for this pack, or find that it is this pack's already."""
    work = destination / WORK_FOLDER_NAME
    plan = work / PLAN_NAME
    if (destination / MANIFEST_NAME).exists():
        if read_manifest(destination).fingerprint != fingerprint:
            raise UserError(f"{destination} holds another packed data set: remove it or choose another folder")
    elif plan.exists():
        if json.loads(plan.read_text())["fingerprint"] != fingerprint:
            raise UserError(
                f"{destination} holds an unfinished pack of another source or with other options: "
                "remove it or choose another folder"
            )
    else:
        check_free(destination)
        with writing(work):
            work.mkdir(parents=True, exist_ok=True)
        write_whole(plan, json.dumps({"fingerprint": fingerprint}).encode())


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Keep other processes from packing into the same folder, such as the other tasks of an srun."""
    with open(destination / WORK_FOLDER_NAME / PLAN_NAME, "rb") as plan:
        try:
            fcntl.flock(plan, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process packs into {destination}: wait for it, or run one task only") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise MachineError(f"{plan.name} cannot be locked: {error.strerror}") from error
        yield


def check_free(destination: Path) -> None:
    """Raise UserError when a folder holds anything that no pack has put there."""
    if destination.exists() and not destination.is_dir():
        raise UserError(f"{destination} is a file: choose a folder")
    if destination.is_dir() and not is_packed(destination) and any(destination.iterdir()):
        raise UserError(f"{destination} is not empty: choose a folder of its own for the packed set")


def _is_done(destination: Path, plan: _ShardPlan) -> bool:
    notes, shard = _notes_path(destination, plan.name), destination / plan.name
    if not notes.exists() or not shard.exists():
        return False
    return bool(json.loads(notes.read_text())["shard"]["bytes"] == shard.stat().st_size)


def _write_shards(source: Source, destination: Path, plans: list[_ShardPlan], jobs: int, progress: Progress) -> None:
    stop = threading.Event()
    total = sum(len(plan.entries) for plan in plans)
    with ThreadPoolExecutor(jobs) as pool, progress(f"packing {source.description}", total) as advance:
        shards = [pool.submit(_write_shard, source, destination, plan, stop, advance) for plan in plans]
        try:
            for shard in as_completed(shards):
                shard.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _write_shard(
    source: Source, destination: Path, plan: _ShardPlan, stop: threading.Event, advance: Callable[[int], None]
) -> None:
    """Write one shard, then the notes that make it count as finished."""
    corrupt: list[str] = []
    writer = ShardWriter(destination / plan.name, destination / WORK_FOLDER_NAME / plan.name)
    try:
        for position, entry in enumerate(plan.entries, plan.first):
            if stop.is_set():
                raise CancelledError
            data = source.read(entry)
            try:
                header = read_header(data)
                check_end(data, header)
            except BadPicture as error:
                corrupt.append(f"{source.place(entry)} {error}")
            else:
                writer.add(sample_key(position, entry.name), data, header, entry.label)
            advance(1)
        shard, records = writer.finish()
    except BaseException:
        writer.abandon()
        raise
    write_whole(_records_path(destination, plan.name), _npy(records))
    notes = {"shard": shard.model_dump(), "corrupt": corrupt}
    write_whole(_notes_path(destination, plan.name), json.dumps(notes).encode())


def _finish(source: Source, destination: Path, plans: list[_ShardPlan], fingerprint: str, skip_corrupt: bool) -> None:
    """Write the indexes, and dataset.json last: it makes the folder count as packed."""
    notes = {plan.name: json.loads(_notes_path(destination, plan.name).read_text()) for plan in plans}
    corrupt = tuple(name for plan in plans for name in notes[plan.name]["corrupt"])
    if corrupt and not skip_corrupt:
        listed = "; ".join(corrupt[:10]) + ("; …" if len(corrupt) > 10 else "")
        raise UserError(
            f"{len(corrupt)} pictures of {source.description} cannot be used ({listed}): mend or remove them and "
            "pack into a new folder, or run again with --skip-corrupt to leave them out"
        )
    splits = {}
    for split in source.splits:
        names = [plan.name for plan in plans if plan.split == split]
        records = [np.load(_records_path(destination, name), allow_pickle=False) for name in names]
        for number, part in enumerate(records):
            part["shard"] = number
        samples = np.concatenate(records)
        if missing := np.flatnonzero(np.bincount(samples["label"], minlength=len(source.classes)) == 0).tolist():
            raise UserError(f"class {source.classes[missing[0]]} has no usable picture in {split}: add one")
        write_whole(index_path(destination, split), _npy(samples))
        splits[split] = PackedSplit(
            samples=len(samples),
            shards=tuple(Shard(**notes[name]["shard"]) for name in names),
            index_sha256=file_sha256(index_path(destination, split)),
        )
    manifest = Manifest(
        schema=SCHEMA, classes=source.classes, splits=splits, corrupt_left_out=corrupt, fingerprint=fingerprint
    )
    write_whole(destination / MANIFEST_NAME, manifest.model_dump_json(by_alias=True, indent=1).encode())


def _result(destination: Path, packed_now: int, seconds: float) -> PackResult:
    manifest = read_manifest(destination)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return PackResult(
        destination=destination,
        samples={name: split.samples for name, split in manifest.splits.items()},
        num_classes=len(manifest.classes),
        num_shards=len(shards),
        size_bytes=sum(shard.bytes for shard in shards),
        corrupt=manifest.corrupt_left_out,
        packed_now=packed_now,
        seconds=seconds,
    )


def _notes_path(destination: Path, shard_name: str) -> Path:
    return destination / WORK_FOLDER_NAME / f"{shard_name}.json"


def _records_path(destination: Path, shard_name: str) -> Path:
    return destination / WORK_FOLDER_NAME / f"{shard_name}.npy"


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
