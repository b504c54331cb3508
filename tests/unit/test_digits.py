from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hpctrain.data.digits import make_digits
from hpctrain.data.manifest import open_packed
from hpctrain.data.reader import SampleReader
from hpctrain.errors import UserError
from tests.needs import needs
from tests.unit.image_folders import tree


def test_digits_are_all_there_and_can_be_read(tmp_path: Path) -> None:
    needs("sklearn")
    from sklearn.datasets import load_digits

    result = make_digits(tmp_path / "a" / "digits")
    assert result.samples == {"train": 1438, "val": 359}
    splits = open_packed(tmp_path / "a" / "digits")
    bunch = load_digits()
    rows: list[int] = []
    for index in splits.values():
        assert np.bincount(index.labels).min() > len(index) / 12
        for sample_id, data in enumerate(SampleReader(index).read(range(len(index)))):
            row = int(Path(index.name(sample_id)).stem.split("-")[-1])
            rows.append(row)
            assert index.labels[sample_id] == bunch.target[row]
            with Image.open(io.BytesIO(data)) as image:
                assert (image.mode, image.size) == ("L", (32, 32))
                small = np.asarray(image.resize((8, 8), Image.Resampling.BOX), dtype=float) / 255 * 16
            assert np.abs(small - bunch.images[row]).max() < 0.5
    assert sorted(rows) == list(range(1797))


def test_made_once_and_always_the_same(tmp_path: Path) -> None:
    needs("sklearn")
    make_digits(tmp_path / "a")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()}
    assert make_digits(tmp_path / "a").packed_now == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").iterdir()} == before
    make_digits(tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_without_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"come with scikit-learn, which is missing: pip install 'hpctrain\[digits\]'"):
        make_digits(tmp_path / "a")
