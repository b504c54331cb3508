"""Reading ahead changes when things happen, and nothing else."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from hpctrain.data.readahead import ReadAhead


def test_results_come_in_order_and_the_end_stays_the_end() -> None:
    stream = ReadAhead(lambda number: number * number, range(50), depth=3)
    assert list(stream) == [number * number for number in range(50)]
    assert next(stream, None) is None
    stream.close()


def test_it_stays_within_its_depth() -> None:
    started: list[int] = []
    stream = ReadAhead(started.append, range(100), depth=2)
    time.sleep(0.2)
    # Two in the queue, one that waits to enter it.
    assert len(started) == 3
    next(stream)
    time.sleep(0.2)
    assert len(started) == 4
    stream.close()


@pytest.mark.parametrize("where", ["function", "items"])
def test_an_error_comes_where_its_result_would_have(where: str) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        if where == "items":
            raise KeyError("3")
        yield 3

    def function(number: int) -> int:
        if where == "function" and number == 3:
            raise KeyError("3")
        return number

    stream = ReadAhead(function, items(), depth=2)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="3"):
        next(stream)
    stream.close()


def test_closing_in_the_middle_ends_the_thread() -> None:
    before = threading.active_count()
    stream = ReadAhead(lambda number: number, range(10**9), depth=2)
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before
