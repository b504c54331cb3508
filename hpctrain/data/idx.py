"""IDX files, the form of MNIST and its kin: one file of pictures, one of labels a split, maybe gzipped.

The format (LeCun, Cortes and Burges, "The MNIST database"): two zero bytes, a type (8: unsigned byte), the
number of dimensions, each dimension as a big-endian 32-bit integer, then the data in C order. Pictures become
lossless PNG when they are packed.
"""

from __future__ import annotations

import gzip
import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from hpctrain.data.folder import check_classes
from hpctrain.data.sources import Entry, Source
from hpctrain.errors import UserError

#: MNIST's own names, with a dot in place of the hyphen on some mirrors and a prefix in EMNIST.
_IMAGES = re.compile(r"(?P<before>.*)(?P<part>train|t10k|test)-images(?P<dot>[-.])idx3-ubyte(?P<gz>\.gz)?")
_SPLIT_OF = {"train": "train", "t10k": "val", "test": "val"}
_UNSIGNED_BYTE = 8


def has_idx_files(folder: Path) -> bool:
    """Whether a folder holds pictures as IDX files."""
    return any(_IMAGES.fullmatch(path.name) for path in folder.iterdir())


def idx_source(folder: Path) -> Source:
    """The pictures of a folder with IDX files, held in memory; classes are called by their numbers."""
    images: dict[str, np.ndarray] = {}
    labels: dict[str, np.ndarray] = {}
    for match in filter(None, (_IMAGES.fullmatch(path.name) for path in sorted(folder.iterdir()))):
        split = _SPLIT_OF[match["part"]]
        if split in images:
            raise UserError(f"{folder} holds more than one IDX file of pictures for {split}: keep one")
        label_name = f"{match['before']}{match['part']}-labels{match['dot']}idx1-ubyte{match['gz'] or ''}"
        images[split] = read_idx(folder / match.string, 3)
        labels[split] = read_idx(folder / label_name, 1)
        if len(images[split]) != len(labels[split]):
            raise UserError(
                f"{folder / match.string} has {len(images[split])} pictures and {label_name} {len(labels[split])} "
                "labels: fetch them again"
            )
    if "train" not in images:
        raise UserError(f"{folder} holds no train-images IDX file: add it")
    return _source(folder, images, labels)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of unsigned bytes as an array of that many dimensions; raises UserError for anything else."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: an IDX data set has it beside its other files") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    header_bytes = 4 + 4 * dimensions
    if len(data) < header_bytes or data[:4] != bytes([0, 0, _UNSIGNED_BYTE, dimensions]):
        raise UserError(f"{path} is not an IDX file of bytes in {dimensions} dimensions: fetch it again")
    shape = struct.unpack(f">{dimensions}I", data[4:header_bytes])
    if len(data) - header_bytes != int(np.prod(shape, dtype=np.int64)):
        raise UserError(f"{path} is cut short or too long for its {shape[0]} items: fetch it again")
    return np.frombuffer(data, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _source(folder: Path, images: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Source:
    numbers = sorted(set(labels["train"].tolist()))
    for split, values in labels.items():
        if unknown := sorted(set(values.tolist()) - set(numbers)):
            raise UserError(f"{folder} has class {unknown[0]} in {split} only: both parts must have the same classes")
    classes = tuple(f"{number:0{len(str(numbers[-1]))}d}" for number in numbers)
    check_classes(classes, str(folder))
    rank_of = {number: label for label, number in enumerate(numbers)}
    entries = [
        Entry(split, rank_of[number], f"{row:06d}", str(folder), row, images[split][row].size)
        for split in sorted(images)
        for row, number in enumerate(labels[split].tolist())
    ]

    def read(entry: Entry) -> bytes:
        png = io.BytesIO()
        Image.fromarray(images[entry.split][entry.offset]).save(png, "PNG")
        return png.getvalue()

    return Source(str(folder), classes, entries, read)
