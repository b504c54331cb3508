from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.kernels.tables import Table, Tables, consecutive, cut_into_chunks

CPU = torch.device("cpu")


@given(st.lists(st.integers(0, 40), max_size=8), st.sampled_from([2, 4]))
def test_chunks_cover_every_element_once(sizes: list[int], element_bytes: int) -> None:
    runs = np.array([(1000 * index, 50 * index, size) for index, size in enumerate(sizes)], np.int64).reshape(-1, 3)
    chunks = cut_into_chunks(runs, element_bytes, chunk=8)
    assert (chunks[:, 2] > 0).all() and (chunks[:, 2] <= 8).all()
    covered = [
        (address + element_bytes * index, start + index)
        for address, start, count in chunks.tolist()
        for index in range(count)
    ]
    assert covered == [
        (address + element_bytes * index, start + index)
        for address, start, count in runs.tolist()
        for index in range(count)
    ]


def test_parts_lie_one_behind_the_other() -> None:
    store = torch.zeros(10)
    runs = consecutive([store[:4], store[4:4], store[6:]])
    assert runs[:, 1:].tolist() == [[0, 4], [4, 0], [4, 4]]
    assert runs[2, 0] - runs[0, 0] == 24
    assert consecutive([]).shape == (0, 3)


def test_a_table_is_made_once_and_forgotten_in_the_end() -> None:
    tables, made = Tables(), []

    def make(table: Table) -> Table:
        made.append(int(table[0]))
        return table + 1

    first = tables.find(np.array([7]), 4, CPU, make)
    assert first.tolist() == [8]
    assert tables.find(np.array([7]), 4, CPU, make) is first
    assert tables.find(np.array([7]), 2, CPU, make) is not first
    for value in range(1000, 2000):
        tables.find(np.array([value]), 4, CPU, make)
    assert tables.find(np.array([7]), 4, CPU, make) is not first
    assert made.count(7) == 3
