from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.gradients.grid import GridReduction, grid_lines, grid_shape, squarest
from hpctrain.gradients.reduction import complete, reduce_
from tests.unit.fake_group import FakeCommunicator, run_group

LENGTH = 48


@given(count=st.integers(1, 4096))
def test_the_squarest_grid_covers_all_ranks_and_none_is_squarer(count: int) -> None:
    length, number = squarest(count)
    assert length * number == count and length >= number
    assert all(count % side for side in range(number + 1, length) if side * side <= count)


@pytest.mark.parametrize(("count", "shape"), [(1, (1, 1)), (2, (2, 1)), (6, (3, 2)), (7, (7, 1)), (1024, (32, 32))])
def test_known_shapes(count: int, shape: tuple[int, int]) -> None:
    assert squarest(count) == shape


@given(nodes=st.integers(2, 16), size=st.integers(2, 8), order=st.randoms(use_true_random=False))
def test_a_row_is_a_node_wherever_the_launcher_put_the_ranks(nodes: int, size: int, order: object) -> None:
    placed = [node for node in range(nodes) for _ in range(size)]
    order.shuffle(placed)  # type: ignore[attr-defined]
    shape = grid_shape(placed)
    assert shape == (size, nodes)
    rows, columns = grid_lines(placed, shape)
    assert all(len({placed[rank] for rank in row}) == 1 for row in rows)
    assert all(len({placed[rank] for rank in column}) == nodes for column in columns)


@pytest.mark.parametrize(
    ("nodes", "shape"),
    [
        pytest.param([0] * 8, (4, 2), id="one node"),
        pytest.param(list(range(4)), (2, 2), id="a rank a node"),
        pytest.param([0, 0, 0, 1, 1, 2], (3, 2), id="nodes of different size"),
    ],
)
def test_otherwise_the_grid_is_square(nodes: list[int], shape: tuple[int, int]) -> None:
    assert grid_shape(nodes) == shape


@given(length=st.integers(1, 12), number=st.integers(1, 12), data=st.data())
def test_each_rank_is_in_one_row_and_one_column_at_the_same_place(
    length: int, number: int, data: st.DataObject
) -> None:
    count = length * number
    nodes = data.draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    rows, columns = grid_lines(nodes, (length, number))
    assert sorted(rank for row in rows for rank in row) == list(range(count))
    assert sorted(rank for column in columns for rank in column) == list(range(count))
    assert {len(row) for row in rows} == {length} and {len(column) for column in columns} == {number}
    assert all(line == sorted(line) for line in rows + columns)
    for place, column in enumerate(columns):
        # The parts that a column adds up must be the same part of the buffer.
        assert {next(row.index(rank) for row in rows if rank in row) for rank in column} == {place}


@pytest.mark.parametrize("shape", [(3, 2), (-2, -4), (8, 8), (0, 8)])
def test_a_grid_that_does_not_cover_the_ranks_is_refused(shape: tuple[int, int]) -> None:
    text = (
        f"a grid of {shape[0]} x {shape[1]} does not cover 8 ranks; "
        "set gradients.grid to two numbers whose product is 8, such as 4 x 2"
    )
    with pytest.raises(UserError) as found:
        grid_lines([0] * 8, shape)
    assert str(found.value) == text


GRIDS = [(1, None), (2, None), (3, None), (4, None), (6, None), (6, (2, 3)), (6, (6, 1)), (6, (1, 6))]


@pytest.mark.parametrize(("ranks", "shape"), GRIDS)
def test_the_sum_over_any_grid(ranks: int, shape: tuple[int, int] | None) -> None:
    def work(comm: FakeCommunicator) -> None:
        buffers = [torch.empty(LENGTH), torch.empty(2 * LENGTH)]
        scratches = [None, torch.empty(2 * LENGTH)]
        reductions = [
            GridReduction(comm, buffer, scratch, shape=shape)
            for buffer, scratch in zip(buffers, scratches, strict=True)
        ]
        for step in range(3):
            for buffer in buffers:
                buffer.copy_(torch.arange(buffer.numel()) % 13 * (comm.rank + 1) + step)
            for reduction in reductions:
                reduction.start()
            complete(reductions)
            for reduction, buffer in zip(reductions, buffers, strict=True):
                reduction.wait()
                expected = torch.arange(buffer.numel()) % 13 * (ranks * (ranks + 1) // 2) + ranks * step
                assert torch.equal(buffer, expected.float())

    run_group(ranks, work)


def test_rows_are_nodes_and_only_their_shares_cross() -> None:
    hosts = ["a", "b", "c", "a", "b", "c"]

    def work(comm: FakeCommunicator) -> tuple[list[int], list[tuple[str, int]], list[tuple[str, int]]]:
        reduce_(GridReduction(comm, torch.ones(LENGTH)))
        mine = [rank for rank in range(6) if hosts[rank] == hosts[comm.rank]]
        row = comm.subgroup(mine)
        column = comm.subgroup([0, 1, 2] if comm.rank < 3 else [3, 4, 5])
        assert isinstance(row, FakeCommunicator) and isinstance(column, FakeCommunicator)
        return mine, row.group.log[row.rank], column.group.log[column.rank]

    for mine, along_row, along_column in run_group(6, work, hosts):
        assert len(mine) == 2
        assert along_row == [("reduce_scatter", LENGTH), ("all_gather", LENGTH // 2)]
        assert along_column == [("all_reduce sum", LENGTH // 2)]


def test_a_grid_is_refused_on_every_rank() -> None:
    with pytest.raises(UserError, match="a grid of 3 x 2 does not cover 4 ranks"):
        run_group(4, lambda comm: GridReduction(comm, torch.ones(LENGTH), shape=(3, 2)))
