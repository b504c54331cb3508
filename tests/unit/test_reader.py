from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.index import RECORD, Index
from hpctrain.data.reader import SampleReader
from hpctrain.errors import MachineError


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Eight shards with four pieces of ten bytes each, and one file that is a sample itself."""
    rows, paths = [], []
    for shard in range(8):
        path = tmp_path / f"{shard}.tar"
        path.write_bytes(bytes(10) + b"".join(bytes([shard * 4 + piece]) * 10 for piece in range(4)))
        rows += [(shard, 10 * (piece + 1), 10, 0, 1, 1, 1) for piece in range(4)]
        paths.append(str(path))
    (tmp_path / "a.jpg").write_bytes(bytes([32]) * 10)
    rows.append((8, 0, 10, 0, 1, 1, 1))
    return Index(np.array(rows, dtype=RECORD), (*paths, str(tmp_path / "a.jpg")), ("x",))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_bytes_come_in_the_order_asked_for(index: Index) -> None:
    ids = np.random.default_rng(1).permutation(len(index))
    assert SampleReader(index).read(ids) == [bytes([i]) * 10 for i in ids]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="counts descriptors in /proc")
def test_open_files_are_bounded_and_given_back(index: Index) -> None:
    before = open_files()
    reader = SampleReader(index, max_open_files=3)
    reader.read(range(len(index)))
    assert open_files() == before + 3
    reader.close()
    assert open_files() == before
    assert reader.read([5]) == [bytes([5]) * 10]


def test_threads_that_push_out_each_others_files(index: Index) -> None:
    reader = SampleReader(index, max_open_files=1)

    def read(seed: int) -> bool:
        ids = np.random.default_rng(seed).integers(0, len(index), 200)
        return reader.read(ids) == [bytes([i]) * 10 for i in ids]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_shard_that_became_shorter(index: Index) -> None:
    os.truncate(index.shards[2], 35)
    with pytest.raises(MachineError, match=r"2\.tar ends at byte 35, its index says 40 or more"):
        SampleReader(index).read([10])


@pytest.mark.parametrize("sample_id", [8, 32])
def test_a_file_that_is_gone(index: Index, sample_id: int) -> None:
    path = index.shards[index.samples[sample_id]["shard"]]
    os.remove(path)
    with pytest.raises(MachineError, match=f"{path} cannot be read: No such file"):
        SampleReader(index).read([sample_id])
