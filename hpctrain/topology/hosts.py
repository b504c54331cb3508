"""Slurm's lists of hosts: from ``a[01-03,7],b-2`` to names, in the list's own order.

The order counts: srun gives rank 0 to the first. Libraries were left out for that reason (ClusterShell sorts) and for
their licence (python-hostlist is under the GPL).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product

from hpctrain.errors import UserError

#: a name with any number of brackets in it, and a list of them: commas within brackets part numbers, not names
_NAME = r"(?:[^\[\],\s]|\[[^\[\]]*\])+"
_LIST = re.compile(rf"(?:{_NAME}(?:,{_NAME})*)?")
_BRACKET = re.compile(r"\[([^\[\]]*)\]")
_RANGE = re.compile(r"([0-9]+)(?:-([0-9]+))?")


def hosts(nodes: str) -> Iterator[str]:
    """The names in ``nodes``, one after the other; an empty list has none.

    A number is as wide as the first one of its range is written: ``[08-10]`` is 08, 09, 10. Several brackets in one
    name count like digits, the last fastest. Raises UserError at an entry that is no such list.
    """
    if _LIST.fullmatch(nodes) is None:
        raise _malformed(nodes)
    for name in re.finditer(_NAME, nodes):
        # What is outside and inside of brackets, in turn.
        parts = _BRACKET.split(name[0])
        choices = [list(_numbers(part, nodes)) if position % 2 else [part] for position, part in enumerate(parts)]
        yield from map("".join, product(*choices))


def first_host(nodes: str) -> str | None:
    """The first name in ``nodes``, where srun puts rank 0; None for an empty list."""
    return next(hosts(nodes), None)


def _numbers(inside: str, nodes: str) -> Iterator[str]:
    """What a bracket's inside such as ``01-03,7`` stands for."""
    for part in inside.split(","):
        match = _RANGE.fullmatch(part)
        if match is None:
            raise _malformed(nodes)
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise _malformed(nodes)
        for number in range(int(first), int(last) + 1):
            yield f"{number:0{len(first)}d}"


def _malformed(nodes: str) -> UserError:
    return UserError(f"{nodes!r} is no list of hosts: write it as Slurm does, such as a[01-03,7],b-2")
