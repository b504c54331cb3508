from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.index import RECORD, Index, check_samples, load_samples
from hpctrain.errors import UserError

ROWS = st.lists(
    st.tuples(
        st.integers(0, 2**32 - 1),
        st.integers(0, 2**64 - 1),
        st.integers(0, 2**32 - 1),
        st.integers(-(2**31), 2**31 - 1),
        st.integers(0, 2**16 - 1),
        st.integers(0, 2**16 - 1),
        st.integers(1, 8),
    ),
    max_size=20,
)


@given(rows=ROWS)
def test_round_trip(rows: list[tuple[int, ...]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("index") / "a.npy"
    np.save(path, np.array(rows, dtype=RECORD))
    loaded = load_samples(path)
    assert [tuple(int(value) for value in row) for row in loaded] == rows
    assert isinstance(loaded, np.memmap) or not rows


@given(rows=ROWS.filter(len), data=st.data())
def test_select_keeps_records_and_their_files(rows: list[tuple[int, ...]], data: st.DataObject) -> None:
    index = Index(np.array(rows, dtype=RECORD), ("/a", "/b"), ("x", "y"))
    ids = np.array(data.draw(st.lists(st.integers(0, len(rows) - 1))), dtype=np.int64)
    part = index.select(ids)
    assert len(part) == len(ids)
    assert part.labels.tolist() == [rows[i][3] for i in ids]
    assert (part.shards, part.classes) == (index.shards, index.classes)


def test_name_of_a_file_and_of_what_cannot_be_read() -> None:
    samples = np.array([(0, 0, 9, 0, 1, 1, 1), (1, 512, 9, 0, 1, 1, 1)], dtype=RECORD)
    index = Index(samples, ("/x/a.jpg", "/x/gone.tar"), ("a",))
    assert index.name(0) == "/x/a.jpg"
    assert index.name(1) == "/x/gone.tar:(byte 512)"


def test_missing_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.index.npy is missing: pack the data set again"):
        load_samples(tmp_path / "train.index.npy")


@pytest.mark.parametrize("content", [b"", b"not an array", b"\x93NUMPY\x01\x00"])
def test_unreadable_index(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npy cannot be read as an index .*: pack the data set again"):
        load_samples(path)


def test_an_index_with_python_objects_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{"run": "me"}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as an index"):
        load_samples(path)


def test_index_of_another_form(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(3))
    with pytest.raises(UserError, match="is not an index of this version of hpctrain"):
        load_samples(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "idx lists no samples: pack the data set again"),
        ([(2, 512, 10, 0, 1, 1, 1)], "idx names shard 2 of 2"),
        ([(0, 512, 10, 3, 1, 1, 1)], r"idx has labels outside 0 … 2"),
        ([(0, 512, 10, -1, 1, 1, 1)], r"idx has labels outside 0 … 2"),
        ([(0, 512, 10, 0, 1, 1, 1), (1, 95, 6, 0, 1, 1, 1)], "idx places sample 1 outside its shard"),
        ([(0, 512, 0, 0, 1, 1, 1)], "idx places sample 0 outside its shard"),
    ],
)
def test_records_that_cannot_be(rows: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_samples(np.array(rows, dtype=RECORD), np.array([1000, 100]), 3, "idx")


def test_records_that_fill_their_shards() -> None:
    check_samples(np.array([(0, 0, 1000, 2, 1, 1, 1), (1, 50, 50, 0, 1, 1, 1)], RECORD), np.array([1000, 100]), 3, "")
