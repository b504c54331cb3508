"""A sum along the sides of a grid of ranks: reduce-scatter along x, all-reduce along y, all-gather along x.

Where x is the ranks of a node this is the hierarchical all-reduce: to other nodes a rank sends less than two x-ths
of the buffer. Otherwise it is the 2D torus of Mikami et al. 2018, whose 2 (x + y - 2) steps are fewer than the
2 (N - 1) of a ring. Either way a rank sends 2 (N - 1) / N of the buffer in all, as in a ring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import isqrt

from torch import Tensor

from hpctrain.comm.base import Communicator, FinishedWork, Work
from hpctrain.errors import UserError
from hpctrain.gradients.reduction import StagedReduction

Shape = tuple[int, int]


def grid_shape(nodes: Sequence[int]) -> Shape:
    """Length and number of the rows for ranks on ``nodes``, the number of each rank's node.

    A row is a node where there are several of equal size, of two ranks or more; else the grid is as square as the
    number of ranks allows, its rows not shorter than its columns.
    """
    sizes = set(Counter(nodes).values())
    if len(sizes) == 1 and 1 < max(sizes) < len(nodes):
        return max(sizes), len(nodes) // max(sizes)
    return squarest(len(nodes))


def squarest(count: int) -> Shape:
    """The two divisors of ``count`` next to its square root, the larger first."""
    side = next(side for side in range(isqrt(count), 0, -1) if count % side == 0)
    return count // side, side


def grid_lines(nodes: Sequence[int], shape: Shape) -> tuple[list[list[int]], list[list[int]]]:
    """The ranks of each row, and of each column: those at the same position of their rows. Ascending.

    Ranks are laid out node by node, so that a row crosses as few nodes as it can, wherever the launcher put them.

    Raises UserError when the grid has not as many places as there are ranks.
    """
    length, number = shape
    if min(shape) < 1 or length * number != len(nodes):
        fitting = " x ".join(map(str, squarest(len(nodes))))
        raise UserError(
            f"a grid of {length} x {number} does not cover {len(nodes)} ranks; "
            f"set gradients.grid to two numbers whose product is {len(nodes)}, such as {fitting}"
        )
    order = sorted(range(len(nodes)), key=lambda rank: (nodes[rank], rank))
    rows = [sorted(order[start : start + length]) for start in range(0, len(order), length)]
    return rows, [sorted(column) for column in zip(*rows, strict=True)]


class GridReduction(StagedReduction):
    """The engine's own sums along rows and columns; the buffer's length must be a multiple of the row's.

    ``shape`` is (length, number) of the rows, by default that of ``grid_shape``; ``scratch`` [n], of the buffer's
    type, takes in this rank's share, for which memory is allocated when none is given. The constructor is collective
    and splits ``comm`` into rows and columns once for all buffers. Raises UserError when the grid does not cover the
    ranks, or when the engine cannot be split.
    """

    def __init__(
        self, comm: Communicator, buffer: Tensor, scratch: Tensor | None = None, *, shape: Shape | None = None
    ) -> None:
        super().__init__(comm, buffer)
        nodes = comm.all_gather_object(comm.topology.node_rank)
        rows, columns = grid_lines(nodes, shape or grid_shape(nodes))
        row, column = _own(comm, rows), _own(comm, columns)
        share = buffer.numel() // len(rows[0])
        part = buffer if row is None else buffer.new_empty(share) if scratch is None else scratch[:share]
        stages: list[Callable[[], Work]] = []
        if row:
            stages.append(partial(row.reduce_scatter_, part, buffer))
        if column:
            stages.append(partial(column.all_reduce_, part))
        if row:
            stages.append(partial(row.all_gather_, buffer, part))
        self._collectives = stages or [FinishedWork]

    def stages(self) -> Sequence[Callable[[], Work]]:
        return self._collectives


def _own(comm: Communicator, lines: Sequence[Sequence[int]]) -> Communicator | None:
    """The group of the line this rank is in, or None where a line is a single rank.

    Splitting is collective over all ranks: each takes part in the making of all lines.
    """
    if len(lines[0]) == 1:
        return None
    return next(group for group in [comm.subgroup(line) for line in lines] if group is not None)
