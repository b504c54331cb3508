"""Cores of a rank, however the launcher bound the ranks."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.topology.placement import cores_of, own_binding


@pytest.mark.parametrize(
    ("bindings", "expected"),
    [
        ([("a", range(16))], [16]),
        ([("a", range(16))] * 2, [8, 8]),
        ([("a", range(8)), ("a", range(8, 16))], [8, 8]),
        ([("a", [0]), ("a", [1])], [1, 1]),
        ([("a", [0, 1])] * 4, [1, 1, 1, 1]),
        ([("a", range(4)), ("b", range(4))], [4, 4]),
        ([("a", range(4)), ("a", range(2, 6))], [3, 3]),
    ],
)
def test_shares(bindings: list, expected: list[int]) -> None:
    assert [cores_of(rank, bindings) for rank in range(len(bindings))] == expected


@given(st.lists(st.sets(st.integers(0, 15), min_size=1), min_size=1, max_size=8))
def test_never_more_than_there_are(bound: list[set[int]]) -> None:
    bindings = [("host", sorted(cores)) for cores in bound]
    shares = [cores_of(rank, bindings) for rank in range(len(bound))]
    assert min(shares) >= 1
    assert sum(share for share in shares if share > 1) <= len(set().union(*bound))


def test_own_binding() -> None:
    assert own_binding("here") == ("here", sorted(os.sched_getaffinity(0)))
