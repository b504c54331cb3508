from __future__ import annotations

import gzip
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpctrain.data.idx import idx_source
from hpctrain.data.manifest import open_packed
from hpctrain.data.pack import pack
from hpctrain.data.progress import no_progress
from hpctrain.data.reader import SampleReader
from hpctrain.errors import UserError

PIXELS = np.random.default_rng(1).integers(0, 256, (40, 5, 7), dtype=np.uint8)
LABELS = np.arange(40, dtype=np.uint8) % 4


def write(path: Path, array: np.ndarray) -> None:
    data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_set(folder: Path, ending: str = "", hyphen: str = "-", test: str = "t10k") -> Path:
    folder.mkdir()
    for part, rows in (("train", slice(0, 30)), (test, slice(30, 40))):
        write(folder / f"{part}-images{hyphen}idx3-ubyte{ending}", PIXELS[rows])
        write(folder / f"{part}-labels{hyphen}idx1-ubyte{ending}", LABELS[rows])
    return folder


@pytest.mark.parametrize(
    "form", [{}, {"ending": ".gz"}, {"hyphen": "."}, {"test": "test"}], ids=["plain", "gz", "dot", "test"]
)
def test_pixels_survive(tmp_path: Path, form: dict[str, str]) -> None:
    pack(write_set(tmp_path / "src", **form), tmp_path / "dst", progress=no_progress)
    for split, rows in (("train", slice(0, 30)), ("val", slice(30, 40))):
        index = open_packed(tmp_path / "dst")[split]
        assert index.classes == ("0", "1", "2", "3")
        images = [np.asarray(Image.open(io.BytesIO(data))) for data in SampleReader(index).read(range(len(index)))]
        found = {(image.tobytes(), label) for image, label in zip(images, index.labels.tolist(), strict=True)}
        assert found == {
            (image.tobytes(), label) for image, label in zip(PIXELS[rows], LABELS[rows].tolist(), strict=True)
        }
        assert images[0].shape == (5, 7)


def test_class_names_sort_as_numbers_do(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    folder.mkdir()
    write(folder / "train-images-idx3-ubyte", PIXELS[:12])
    write(folder / "train-labels-idx1-ubyte", np.arange(12, dtype=np.uint8))
    assert idx_source(folder).classes == tuple(f"{number:02d}" for number in range(12))


def test_missing_parts(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "src")
    (folder / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="train-labels-idx1-ubyte is missing: an IDX data set has it beside"):
        idx_source(folder)
    (folder / "train-images-idx3-ubyte").unlink()
    with pytest.raises(UserError, match="holds no train-images IDX file: add it"):
        idx_source(folder)


def test_two_forms_of_the_same(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "src")
    write(folder / "train-images-idx3-ubyte.gz", PIXELS[:30])
    with pytest.raises(UserError, match="holds more than one IDX file of pictures for train: keep one"):
        idx_source(folder)


def test_broken_files(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "src", ".gz")
    path = folder / "train-images-idx3-ubyte.gz"
    os.truncate(path, 200)
    with pytest.raises(UserError, match=r"idx3-ubyte\.gz cannot be read .*: fetch it again"):
        idx_source(folder)
    write(path, PIXELS[0])
    with pytest.raises(UserError, match=r"idx3-ubyte\.gz is not an IDX file of bytes in 3 dimensions"):
        idx_source(folder)
    path.write_bytes(gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", 30, 5, 7) + bytes(99)))
    with pytest.raises(UserError, match=r"idx3-ubyte\.gz is cut short or too long for its 30 items"):
        idx_source(folder)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "src")
    write(folder / "t10k-labels-idx1-ubyte", np.full(10, 9, dtype=np.uint8))
    with pytest.raises(UserError, match="has class 9 in val only: both parts must have the same classes"):
        idx_source(folder)
    write(folder / "t10k-labels-idx1-ubyte", LABELS[:5])
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte has 10 pictures and t10k-labels-idx1-ubyte 5 labels"):
        idx_source(folder)
