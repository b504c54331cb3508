"""Applies a function to a stream in a background thread, a few items ahead, so that the latency of files hides.

Order, results and errors are those of ``map``. It knows nothing of samples; decoding is not done here, since
Python threads would queue for the interpreter.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class _End:
    """No more results: the stream was used up, or an error ended it."""

    error: BaseException | None


class ReadAhead(Generic[Result]):
    """Iterates over ``function(item)`` for each of ``items``, at most ``depth`` results ahead of the consumer.

    An exception of ``function`` or ``items`` is raised where its result would have come. ``close`` ends the
    thread; it is to be called whether or not the stream was used up.
    """

    def __init__(self, function: Callable[[Item], Result], items: Iterable[Item], depth: int) -> None:
        self._queue: queue.Queue[Result | _End] = queue.Queue(maxsize=depth)
        self._ended = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(
            target=self._work, args=(function, iter(items)), name="hpctrain-read-ahead", daemon=True
        )
        self._thread.start()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._ended:
            raise StopIteration
        result = self._queue.get()
        if isinstance(result, _End):
            self._ended = True
            raise result.error or StopIteration
        return result

    def close(self) -> None:
        """End the thread; what it read ahead is dropped."""
        self._stopping.set()
        self._thread.join()

    def _work(self, function: Callable[[Item], Result], items: Iterator[Item]) -> None:
        try:
            for item in items:
                if not self._put(function(item)):
                    return
            self._put(_End(None))
        except BaseException as error:
            self._put(_End(error))

    def _put(self, entry: Result | _End) -> bool:
        while not self._stopping.is_set():
            try:
                self._queue.put(entry, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False
