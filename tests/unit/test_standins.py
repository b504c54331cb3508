"""Files are looked at once, and no more closely than they need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hpctrain.config.schema import DataConfig
from hpctrain.data import standins
from hpctrain.data.standins import GuardedReader
from tests.unit.pictures import encoded, index_of, picture


@pytest.fixture
def files() -> list[bytes]:
    """A sound one, one with bytes behind its end, which decodes, and one that does not."""
    good = [encoded(picture(64, 48, seed)) for seed in range(3)]
    return [good[0], good[1] + b"more", good[2][: len(good[2]) // 2], good[2]]


def test_a_file_is_looked_at_once(files: list[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []

    def counted(data: bytes, record: np.void) -> bool:
        looked.append(len(data))
        return True

    monkeypatch.setattr(standins, "is_sound", counted)
    reader = GuardedReader(DataConfig(), index_of(tmp_path, files))
    for _ in range(3):
        ids, read = reader.fetch(np.array([3, 0]))
        assert ids.tolist() == [3, 0]
        assert read == [files[3], files[0]]
    assert looked == [len(files[3]), len(files[0])]


def test_only_doubtful_files_that_pillow_decodes_are_tried(files: list[bytes], tmp_path: Path) -> None:
    tried: list[int] = []

    def trial(sample_id: int, data: bytes) -> str | None:
        assert data == files[sample_id]
        tried.append(sample_id)
        return None

    reader = GuardedReader(DataConfig(max_corrupt_share=0.5), index_of(tmp_path, files), trial)
    for _ in range(2):
        ids, read = reader.fetch(np.arange(4))
        assert ids.tolist() == [0, 1, 3, 3]
        assert read == [files[0], files[1], files[3], files[3]]
    assert tried == [1]
    assert list(reader.faults) == [2]


def test_a_failed_trial_makes_a_sample_corrupt(files: list[bytes], tmp_path: Path) -> None:
    index = index_of(tmp_path, files)
    reader = GuardedReader(DataConfig(max_corrupt_share=0.5), index, lambda sample_id, data: "it is not to my taste")
    assert reader.fetch(np.array([1]))[0].tolist() == [3]
    assert reader.corrupt[0] == f"{index.name(1)}: it is not to my taste"
    assert list(reader.faults) == [1, 2]
