"""Slow and broken nodes from figures: who is named whatever the number of nodes, and that sound ones are not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.doctor.place import numa_nodes, physical_cores
from hpctrain.doctor.speed import Pace, Sum, groups, multiply, time_product
from hpctrain.doctor.suspects import Suspect, confirm, find_suspects, sentence
from tests.unit.test_doctor_judge import job


def paces(
    nodes: int,
    ranks: int,
    *,
    product: dict[int, float] | None = None,
    link: dict[int, float] | None = None,
    noise: float = 1.0,
    wrong: tuple[int, ...] = (),
    spoilt: tuple[int, ...] = (),
    stride: int = 1,
) -> list[Pace]:
    """Figures by rank; ``product`` and ``link`` slow the products of nodes, or their sums with others, by a factor.

    ``wrong`` nodes get another product, ``spoilt`` ones spoil what they sum with others. Neighbours are those of the
    second measurement with a ``stride`` of 2.
    """
    hosts = [f"n{rank // ranks}" for rank in range(nodes * ranks)]
    ring = [f"n{node}" for first in range(stride) for node in range(first, nodes, stride)]
    sums = {}
    for names in (names for together in groups(ring) for names in together):
        numbers = [int(name[1:]) for name in names]
        slowest = max((link or {}).get(number, 1.0) for number in numbers) if len(names) > 1 else 1.0
        sums[names] = Sum(names, 0.01 * len(names) * slowest, len(names) == 1 or not set(numbers) & set(spoilt))
    found = []
    for rank, host in enumerate(hosts):
        seconds = 0.004 * (product or {}).get(rank // ranks, 1.0) * (noise if rank % 2 else 1.0)
        mine = tuple(one for names, one in sums.items() if host in names and (len(names) > 1 or ranks > 1))
        found.append(Pace(seconds, 8.0 if rank // ranks in wrong else 7.0, mine))
    return found


def suspects(nodes: int, ranks: int, found: list[Pace], device: str = "cuda") -> list[Suspect]:
    return find_suspects(job(nodes, ranks, gpus=ranks), found, device)


#: by which the figures of sound nodes differ
NOISE = st.floats(1.0, 1.15)
counts = st.tuples(st.integers(1, 9), st.integers(1, 4))


@given(counts, NOISE, st.data())
def test_sound_nodes_are_not_suspected(size: tuple[int, int], noise: float, data: st.DataObject) -> None:
    links = {node: data.draw(NOISE) for node in range(size[0])}
    assert suspects(*size, paces(*size, noise=noise, link=links)) == []


@given(st.integers(2, 9), st.integers(1, 4), st.data())
def test_a_node_that_computes_slowly_is_named(nodes: int, ranks: int, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, nodes - 1))
    (told,) = suspects(nodes, ranks, paces(nodes, ranks, product={slow: 2.0}))
    assert (told.host, told.node, told.broken) == (f"n{slow}", f"gpu{slow:02}", False)
    assert "2.0 times the median" in told.reason


@given(st.integers(3, 9), st.integers(1, 4), st.data())
def test_a_node_on_a_slow_link_is_told_from_its_neighbours(nodes: int, ranks: int, data: st.DataObject) -> None:
    slow = data.draw(st.integers(0, nodes - 1))
    links = {node: data.draw(NOISE) for node in range(nodes)} | {slow: 3.0}
    (told,) = suspects(nodes, ranks, paces(nodes, ranks, link=links))
    assert told.host == f"n{slow}" and "times the median" in told.reason


def test_of_two_nodes_neither_is_blamed_for_the_link_between_them() -> None:
    assert suspects(2, 1, paces(2, 1, link={0: 3.0})) == []


def test_a_slow_rank_within_a_node_is_named() -> None:
    found = paces(1, 4)
    found[2] = Pace(0.02, 7.0, found[2].sums)
    (told,) = suspects(1, 4, found)
    assert told.reason == "rank 2 takes 5.0 times the median (20.0 ms, not 4.0) for a matrix product"


def test_another_result_is_broken() -> None:
    (told,) = suspects(4, 1, paces(4, 1, wrong=(2,)))
    assert told.broken and told.host == "n2" and "computes another matrix product" in told.reason


@given(st.integers(3, 9), st.integers(1, 4), st.data())
def test_who_spoils_sums_is_broken(nodes: int, ranks: int, data: st.DataObject) -> None:
    spoilt = data.draw(st.integers(0, nodes - 1))
    (told,) = suspects(nodes, ranks, paces(nodes, ranks, spoilt=(spoilt,)))
    assert told.broken and told.host == f"n{spoilt}" and told.reason.startswith("sums come out wrong with n")


def test_of_two_nodes_with_wrong_sums_either_may_be_broken() -> None:
    assert [told.host for told in suspects(2, 2, paces(2, 2, spoilt=(0,)))] == ["n0", "n1"]


def test_cpus_may_differ_more_than_gpus() -> None:
    figures = paces(3, 1, product={1: 1.4})
    assert len(suspects(3, 1, figures, "cuda")) == 1
    assert suspects(3, 1, figures, "cpu") == []


def test_only_what_is_found_twice_counts_unless_it_is_broken() -> None:
    once, twice = Suspect("n1", "gpu01", "…", False), Suspect("n2", "gpu02", "…", False)
    wrong = Suspect("n3", "gpu03", "…", True)
    assert confirm([once, twice], [twice]) == [twice]
    assert confirm([once, wrong], []) == [wrong]
    assert confirm([once], [wrong]) == [wrong]


@given(st.integers(6, 12), st.data())
def test_a_sound_node_between_two_slow_ones_is_cleared_by_other_neighbours(nodes: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, nodes - 1))
    slow = {first: 3.0, (first + 2) % nodes: 3.0}
    found = [suspects(nodes, 1, paces(nodes, 1, link=slow, stride=stride)) for stride in (1, 2)]
    between = f"n{(first + 1) % nodes}"
    assert between in {told.host for told in found[0]}
    assert {told.host for told in confirm(*found)} == {f"n{node}" for node in slow}


def test_the_sentence_ends_with_what_to_type() -> None:
    told = sentence([Suspect("n1", "gpu01", "why", False), Suspect("n2", "gpu02", "how", True)])
    assert told.startswith("n1 is slow (why); n2 is broken (how): submit again with --exclude=gpu01,gpu02 (`hpctrain")
    assert told.endswith(" takes it behind `--`)")


@given(st.integers(1, 20))
def test_in_each_round_a_host_sums_once_and_pairs_make_a_ring(nodes: int) -> None:
    names = [f"n{number}" for number in range(nodes)]
    rounds = groups(names)
    for together in rounds:
        flat = [name for some in together for name in some]
        assert len(flat) == len(set(flat))
    assert rounds[0] == [(name,) for name in names]
    pairs = [set(some) for together in rounds[1:] for some in together]
    assert all(len(pair) == 2 for pair in pairs)
    degree = {name: sum(name in pair for pair in pairs) for name in names}
    assert set(degree.values()) == {0 if nodes == 1 else 1 if nodes == 2 else 2}


def test_a_product_is_timed_and_summed_alike_each_time() -> None:
    (first, one), (second, two) = (time_product(torch.device("cpu")) for _ in range(2))
    assert first > 0 and second > 0 and one == two
    matrix = torch.full((4, 4), 1.0)
    output = torch.empty(4, 4)
    multiply(matrix, output)
    assert output.tolist() == [[4.0] * 4] * 4


@pytest.mark.parametrize(("cores", "expected"), [([0, 4], 1), ([0, 1, 4, 5], 2), ([0, 1, 9], 3), ([2, 3], 2), ([], 0)])
def test_hardware_threads_of_one_core_count_once(tmp_path: Path, cores: list[int], expected: int) -> None:
    """Four cores of two threads each; of 8 and further on the kernel tells nothing."""
    for core in range(8):
        (tmp_path / f"cpu{core}/topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}/topology/thread_siblings_list").write_text(f"{core % 4},{core % 4 + 4}\n")
    assert physical_cores(cores, tmp_path) == expected


@pytest.mark.parametrize(("cores", "expected"), [([0, 1], (0,)), ([3, 9], (0, 1)), ([64], ())])
def test_numa_nodes_of_cores(tmp_path: Path, cores: list[int], expected: tuple[int, ...]) -> None:
    root = tmp_path
    for node, listed in ((0, "0-3,8-11\n"), (1, "4-7,9\n")):
        (root / f"node{node}").mkdir()
        (root / f"node{node}" / "cpulist").write_text(listed)
    if 9 in cores:
        (root / "node0/cpulist").write_text("0-3\n")
    assert numa_nodes(cores, root) == expected
