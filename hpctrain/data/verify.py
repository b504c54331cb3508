"""`hpctrain data verify`: decode every picture of an image folder or packed set and name what is wrong.

For packed sets the digests of the shards and the agreement of tar members, labels and index are checked too.
Nothing is changed.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.examine import Examined, Finding, examine
from hpctrain.data.index import Index
from hpctrain.data.manifest import (
    PackedSplit,
    check_shard_size,
    file_sha256,
    index_path,
    is_packed,
    open_split,
    read_manifest,
)
from hpctrain.data.progress import Progress, show_progress
from hpctrain.data.sources import Entry, folder_source, tar_members
from hpctrain.errors import UserError

SCHEMA = "hpctrain-verify-1"
DEFAULT_JOBS = os.cpu_count() or 1

_CHUNK = 64
_LISTED = 50


@dataclass(frozen=True)
class VerifyReport:
    """What was found. ``problems`` need mending; ``notes`` are told and do no harm."""

    path: Path
    pictures: int
    num_classes: int
    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.problems

    def text(self) -> str:
        """Lines for the user: the verdict, then every problem by name, then notes by their number."""
        verdict = "no problems" if self.ok else f"problems: {_counts(self.problems)}"
        lines = [
            f"{self.path}: {self.pictures:,} pictures of {self.num_classes} classes decoded "
            f"in {self.seconds:.1f} s: {verdict}."
        ]
        lines += [f"  {finding.kind}: {finding.name} {finding.detail}" for finding in self.problems]
        if self.notes:
            lines.append(f"Worth knowing: {_counts(self.notes)}.")
            told = [finding for finding in self.notes if finding.kind != "grey"]
            lines += [f"  {finding.kind}: {finding.name} {finding.detail}" for finding in told[:_LISTED]]
            if len(told) > _LISTED:
                lines.append(f"  and {len(told) - _LISTED} more, all of them in the JSON report")
        return "\n".join(lines)

    def to_record(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {
            "schema": SCHEMA,
            "path": str(self.path),
            "ok": self.ok,
            "pictures": self.pictures,
            "num_classes": self.num_classes,
            "seconds": round(self.seconds, 3),
            "problems": [asdict(finding) for finding in self.problems],
            "notes": [asdict(finding) for finding in self.notes],
        }


def verify(path: Path, *, jobs: int = DEFAULT_JOBS, progress: Progress = show_progress) -> VerifyReport:
    """Check a data set with ``jobs`` processes; raises UserError when ``path`` is no data set at all."""
    start = time.perf_counter()
    path = path.absolute()
    classes, entries, problems = _list_packed(path, progress) if is_packed(path) else _list_folder(path)
    names = [_name(entry) for entry in entries]
    examined = _examine_all(entries, names, classes, jobs, progress)
    problems += [finding for one in examined for finding in one.problems]
    notes = [finding for one in examined for finding in one.notes]
    twins, copies = _twins(entries, names, examined, classes)
    return VerifyReport(
        path=path,
        pictures=len(entries),
        num_classes=len(classes),
        problems=tuple(problems + twins),
        notes=tuple(notes + copies),
        seconds=time.perf_counter() - start,
    )


_Listed = tuple[tuple[str, ...], list[Entry], list[Finding]]


def _list_folder(path: Path) -> _Listed:
    source = folder_source(path)
    return source.classes, source.entries, []


def _list_packed(path: Path, progress: Progress) -> _Listed:
    """The pictures of every split whose shards and index fit together, and what does not fit."""
    manifest = read_manifest(path)
    entries: list[Entry] = []
    problems: list[Finding] = []
    for name, split in manifest.splits.items():
        wrong_shards = _check_shards(path, name, split, progress)
        problems += wrong_shards
        if any(finding.kind == "shard" for finding in wrong_shards):
            continue
        try:
            index = open_split(path, name, split, manifest.classes)
        except UserError as error:
            problems.append(Finding("index", str(index_path(path, name)), f"does not fit: {error}"))
            continue
        for shard in range(len(index.shards)):
            found, wrong = _walk(index, shard, name)
            entries += found
            problems += wrong
    return manifest.classes, entries, problems


def _check_shards(path: Path, name: str, split: PackedSplit, progress: Progress) -> list[Finding]:
    """Size and digest of each shard."""
    problems = []
    with ThreadPoolExecutor() as pool, progress(f"reading shards of {name}", split.samples) as advance:
        sound = []
        for shard in split.shards:
            try:
                check_shard_size(path / shard.name, shard)
                sound.append(shard)
            except UserError as error:
                problems.append(Finding("shard", str(path / shard.name), f"is not whole: {error}"))
        digests = pool.map(file_sha256, [path / shard.name for shard in sound])
        for shard, digest in zip(sound, digests, strict=True):
            if digest != shard.sha256:
                problems.append(Finding("digest", str(path / shard.name), "has other contents than were packed"))
            advance(shard.samples)
    return problems


def _walk(index: Index, shard: int, split: str) -> tuple[list[Entry], list[Finding]]:
    """The pictures of a shard as its tar tells them; a problem where its index tells anything else."""
    path = index.shards[shard]
    entries: list[Entry] = []
    labels: list[int] = []
    try:
        with open(path, "rb") as file:
            for name, offset, size in tar_members(Path(path)):
                if name.endswith(".cls"):
                    file.seek(offset)
                    labels.append(int(file.read(size)))
                else:
                    entries.append(Entry(split, 0, name, path, offset, size))
    except (UserError, ValueError) as error:
        return [], [Finding("tar", path, f"is not as it was packed: {error}")]
    told = index.samples[index.samples["shard"] == shard]
    places = np.array([(entry.offset, entry.length) for entry in entries], dtype=np.uint64).reshape(-1, 2)
    same = (
        len(labels) == len(entries) == len(told)
        and np.array_equal(places[:, 0], told["offset"])
        and np.array_equal(places[:, 1], told["length"])
        and np.array_equal(labels, told["label"])
    )
    if not same:
        return [], [Finding("index", path, "has other members or labels than its index lists")]
    return [Entry(split, label, e.name, path, e.offset, e.length) for e, label in zip(entries, labels, strict=True)], []


def _examine_all(
    entries: list[Entry], names: list[str], classes: tuple[str, ...], jobs: int, progress: Progress
) -> list[Examined]:
    """Decode in processes: Pillow holds Python's lock while it decodes."""
    examined: list[Examined] = []
    with progress("decoding", len(entries)) as advance:
        work = partial(_examine_chunk, classes=classes)
        chunks = _chunks(zip(entries, names, strict=True))
        if jobs == 1:
            results: Iterable[list[Examined]] = map(work, chunks)
            for result in results:
                examined += result
                advance(len(result))
            return examined
        # Fresh processes: forking one that has threads of torch or MPI may hang.
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for result in pool.map(work, chunks):
                examined += result
                advance(len(result))
    return examined


def _examine_chunk(chunk: list[tuple[Entry, str]], classes: tuple[str, ...]) -> list[Examined]:
    return [examine(entry, name, classes) for entry, name in chunk]


def _chunks(items: Iterable[tuple[Entry, str]]) -> Iterator[list[tuple[Entry, str]]]:
    rest = iter(items)
    while chunk := list(islice(rest, _CHUNK)):
        yield chunk


def _twins(
    entries: list[Entry], names: list[str], examined: list[Examined], classes: tuple[str, ...]
) -> tuple[list[Finding], list[Finding]]:
    """Equal pictures in two classes, each with the other's name; and validation pictures that train has too."""
    first: dict[bytes, int] = {}
    twins, copies = [], []
    for number, one in enumerate(examined):
        other = first.setdefault(one.digest, number) if one.digest else number
        if entries[other].label != entries[number].label:
            where = f"{names[other]} in class {classes[entries[other].label]}"
            twins.append(Finding("mislabelled", names[number], f"is the same picture as {where}"))
        elif entries[other].split != entries[number].split:
            copies.append(Finding("in-both-parts", names[number], f"is the same picture as {names[other]}"))
    return twins, copies


def _name(entry: Entry) -> str:
    return entry.path if entry.offset == 0 else f"{entry.path}:{entry.name}"


def _counts(findings: tuple[Finding, ...]) -> str:
    counts = Counter(finding.kind for finding in findings)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
