"""Open the data set of a run, on all ranks at once: packed folder, image folder or made-up samples.

Rank 0 looks at the files and tells the others, so that a job of a thousand ranks asks the file system once
and all of them fail with the same sentence. It decides nothing about order, crops or batches.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import numpy as np
import torch

from hpctrain.comm.agree import on_rank_zero, raise_together
from hpctrain.comm.base import Communicator
from hpctrain.config.schema import DataConfig
from hpctrain.data.folder import SCAN_THREADS, list_folder, scan
from hpctrain.data.hashing import hash_counters, stream_key
from hpctrain.data.index import RECORD, Index
from hpctrain.data.manifest import find_member, is_packed, open_packed
from hpctrain.data.progress import Progress, show_progress
from hpctrain.data.split import hold_out, name_hash, safe_stem, stem_of_key
from hpctrain.errors import UserError

#: ImageNet's proportion of training to validation pictures, for the synthetic set.
_SYNTHETIC_TRAIN_PER_VAL = 25
_SYNTHETIC_CLASSES = 1000
_SYNTHETIC_LABELS = 6


@dataclass(frozen=True)
class Dataset:
    """The two splits of a run; ``classes`` by label."""

    train: Index
    val: Index
    classes: tuple[str, ...]


def open_dataset(comm: Communicator, data: DataConfig, seed: int, progress: Progress = show_progress) -> Dataset:
    """The data set that ``data`` asks for, the same on every rank. Collective.

    ``seed`` gives the synthetic set its labels; files and the held-out part do not depend on it. Raises
    UserError, on every rank, when the files are not such a data set or not the one that was asked for.
    """
    if data.loader == "synthetic":
        return _synthetic(data, seed)
    found: dict[str, Index] = {}
    held = np.zeros(0, dtype=bool)

    def open_here() -> dict[str, object]:
        nonlocal held
        found.update(_open(data, progress))
        if "val" not in found:
            held = _hold_out(found["train"], data.val_fraction)
        return {"classes": found["train"].classes, "splits": sorted(found)}

    described = on_rank_zero(comm, open_here)
    classes = tuple(described["classes"])
    splits = {name: _share_index(comm, found.get(name), classes) for name in described["splits"]}
    train = splits["train"]
    if "val" in splits:
        val = splits["val"]
    else:
        held = _share(comm, held.view(np.uint8)).view(bool)
        train, val = train.select(np.flatnonzero(~held)), train.select(np.flatnonzero(held))
    _check_visible(comm, (train, val))
    return Dataset(train, val, classes)


def _open(data: DataConfig, progress: Progress) -> dict[str, Index]:
    """The index of each split there is, checked against what was asked for. On rank 0."""
    if data.path is None:
        raise UserError("data.path is not set: name a packed or image folder, or take data.loader=synthetic")
    root = Path(data.path).expanduser().absolute()
    splits = open_packed(root) if is_packed(root) else _open_folder(root, progress)
    classes = splits["train"].classes
    if data.num_classes not in (None, len(classes)):
        raise UserError(
            f"data.num_classes is {data.num_classes} but {root} has {len(classes)} classes: "
            "leave it out or name another data set"
        )
    if "val" in splits and data.val_fraction > 0:
        raise UserError(f"{root} has a validation part: leave out data.val_fraction={data.val_fraction}")
    if "val" not in splits and data.val_fraction == 0:
        raise UserError(f"{root} has no validation part: set data.val_fraction or add one")
    return splits


def _open_folder(root: Path, progress: Progress) -> dict[str, Index]:
    listing = list_folder(root)
    return {
        name: Index(scan(split, progress, f"scanning {root} ({name})"), tuple(split.paths), listing.classes)
        for name, split in listing.splits.items()
    }


def _hold_out(index: Index, fraction: float) -> np.ndarray:
    classes = [index.classes[label] for label in index.samples["label"].tolist()]
    parts = np.array_split(np.arange(len(index)), SCAN_THREADS)
    with ThreadPoolExecutor(SCAN_THREADS) as pool:
        stems = [stem for part in pool.map(_stems, repeat(index), parts) for stem in part]
    hashes = [name_hash(*name) for name in zip(classes, stems, strict=True)]
    return hold_out(hashes, index.samples["label"], fraction)


def _stems(index: Index, sample_ids: np.ndarray) -> list[str]:
    """The names that samples had before they were packed, as far as their keys keep them."""
    stems = []
    for sample_id in sample_ids.tolist():
        record = index.samples[sample_id]
        if record["offset"] == 0:
            stems.append(safe_stem(os.path.basename(index.shards[record["shard"]])))
        else:
            stems.append(stem_of_key(find_member(index, sample_id).name))
    return stems


def _share_index(comm: Communicator, index: Index | None, classes: tuple[str, ...]) -> Index:
    """Rank 0's index, on every rank."""
    records = index.samples.view(np.uint8) if index else np.zeros(0, dtype=np.uint8)
    paths = b"\0".join(os.fsencode(path) for path in index.shards) if index else b""
    samples = _share(comm, records).view(RECORD)
    shards = _share(comm, np.frombuffer(paths, dtype=np.uint8)).tobytes().split(b"\0")
    return Index(samples, tuple(os.fsdecode(path) for path in shards), classes)


def _share(comm: Communicator, array: np.ndarray) -> np.ndarray:
    """Rank 0's ``array`` [n] of uint8, on every rank."""
    size = int(comm.broadcast_object(len(array)))
    buffer = torch.zeros(size, dtype=torch.uint8, device=comm.device)
    if comm.rank == 0:
        buffer.copy_(torch.from_numpy(np.array(array)))
    comm.broadcast_(buffer).wait()
    return buffer.cpu().numpy()


def _check_visible(comm: Communicator, splits: tuple[Index, Index]) -> None:
    """Fail on all ranks when one does not see the files that rank 0 has found."""
    error = None
    for index in splits:
        for path in {index.shards[0], index.shards[-1]}:
            if not os.access(path, os.R_OK):
                host = comm.topology.host
                error = UserError(f"{path} cannot be read on {host}: data.path must lead to the data on every node")
    raise_together(comm, error)


def _synthetic(data: DataConfig, seed: int) -> Dataset:
    """Samples without files: a size and a label each."""
    num_classes = data.num_classes or _SYNTHETIC_CLASSES
    classes = tuple(str(number) for number in range(num_classes))

    def split(length: int, part: int) -> Index:
        samples = np.zeros(length, dtype=RECORD)
        random = hash_counters(stream_key(seed, _SYNTHETIC_LABELS, part), np.arange(length))
        samples["label"] = random % np.uint64(num_classes)
        samples["width"] = samples["height"] = data.image_size
        samples["orientation"] = 1
        return Index(samples, ("synthetic",), classes)

    val_length = max(1, data.synthetic_samples // _SYNTHETIC_TRAIN_PER_VAL)
    return Dataset(split(data.synthetic_samples, 0), split(val_length, 1), classes)
