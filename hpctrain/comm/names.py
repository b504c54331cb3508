"""Names for an engine that matches the operations of different ranks by name, as Horovod does."""

from __future__ import annotations

from collections import defaultdict


class Names:
    """Names of operations under way, reused so that an engine's cache of names knows them.

    Ranks match operations by name, so a name depends only on the program's order of starts and waits: the lowest
    number that is free among operations of the same kind, dtype and size.
    """

    def __init__(self) -> None:
        self._taken: defaultdict[str, set[int]] = defaultdict(set)

    def take(self, kind: str) -> tuple[str, int]:
        taken = self._taken[kind]
        number = next(number for number in range(len(taken) + 1) if number not in taken)
        taken.add(number)
        return kind, number

    def give_back(self, name: tuple[str, int]) -> None:
        self._taken[name[0]].discard(name[1])
