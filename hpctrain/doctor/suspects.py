"""Which nodes are slow or broken, from the figures of all ranks: pure, and the same on every rank.

A figure is held against the median of its kind, since most nodes are sound. A sum of two nodes is as slow as the
slower of them, so that a node is judged by the best of the sums that it took part in.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpctrain.doctor.place import RankPlace
from hpctrain.doctor.speed import Pace, Sum

#: Times the median from which a figure is called slow. GPUs of one kind agree within a few percent, CPUs whose pace
#: depends on their neighbours do not.
_SLOW = {"cuda": 1.2, "cpu": 1.5}


@dataclass(frozen=True, slots=True)
class Suspect:
    """A node that should not be trained on, and why; ``broken``: its results are wrong."""

    host: str
    node: str
    reason: str
    broken: bool


def find_suspects(places: Sequence[RankPlace], paces: Sequence[Pace], device_type: str) -> list[Suspect]:
    """The suspects in order of hosts; all lists by rank."""
    factor = _SLOW[device_type]
    found: dict[str, list[tuple[str, bool]]] = {}
    for host, reason, broken in (
        *_wrong(places, paces),
        *_slow_products(places, paces, factor),
        *_slow_sums(paces, factor),
    ):
        found.setdefault(host, []).append((reason, broken))
    nodes = {place.host: place.node for place in places}
    return [
        Suspect(host, node, ", ".join(reason for reason, _ in found[host]), any(broken for _, broken in found[host]))
        for host, node in nodes.items()
        if host in found
    ]


def confirm(first: Sequence[Suspect], second: Sequence[Suspect]) -> list[Suspect]:
    """Those that were found twice, by what was found first, or broken once: a disturbance passes."""
    hosts = {suspect.host for suspect in second}
    broken = {suspect.host: suspect for suspect in (*second, *first) if suspect.broken}
    slow = {suspect.host: suspect for suspect in first if suspect.host in hosts}
    return list((slow | broken).values())


def sentence(suspects: Sequence[Suspect]) -> str:
    """Who, why, and the line to submit again with."""
    named = "; ".join(
        f"{suspect.host} is {'broken' if suspect.broken else 'slow'} ({suspect.reason})" for suspect in suspects
    )
    nodes = ",".join(suspect.node for suspect in suspects)
    return f"{named}: submit again with --exclude={nodes} (`hpctrain submit` takes it behind `--`)"


def _wrong(places: Sequence[RankPlace], paces: Sequence[Pace]) -> Iterator[tuple[str, str, bool]]:
    usual, _ = Counter(pace.checksum for pace in paces).most_common(1)[0]
    for place, pace in zip(places, paces, strict=True):
        if pace.checksum != usual:
            yield place.host, f"rank {place.rank} computes another matrix product than the others", True
    for sums in _by_kind(paces):
        for host in _hosts(sums):
            # A wrong sum is seen by all that took part: the culprit is who saw no right one.
            if not any(one.right for one in sums if host in one.hosts):
                yield host, f"sums come out wrong {_with(host, sums)}", True


def _slow_products(
    places: Sequence[RankPlace], paces: Sequence[Pace], factor: float
) -> Iterator[tuple[str, str, bool]]:
    usual_s = statistics.median_low([pace.product_s for pace in paces])
    worst: dict[str, tuple[float, int]] = {}
    for place, pace in zip(places, paces, strict=True):
        worst[place.host] = max(worst.get(place.host, (0.0, 0)), (pace.product_s, place.rank))
    for host, (seconds, rank) in worst.items():
        if seconds > factor * usual_s:
            yield host, f"rank {rank} takes {_times(seconds, usual_s)} for a matrix product", False


def _slow_sums(paces: Sequence[Pace], factor: float) -> Iterator[tuple[str, str, bool]]:
    """Hosts whose best sum of one kind is slow beside the best sums of the others."""
    for sums in _by_kind(paces):
        if not sums:
            continue
        best_s = {host: min(one.seconds for one in sums if host in one.hosts) for host in _hosts(sums)}
        # Of the sums themselves most are slow where three hosts have one slow cable among them.
        usual_s = statistics.median_low(best_s.values())
        for host, seconds in best_s.items():
            if seconds > factor * usual_s:
                yield host, f"takes {_times(seconds, usual_s)} for a sum {_with(host, sums)}", False


def _by_kind(paces: Sequence[Pace]) -> tuple[list[Sum], list[Sum]]:
    """The sums of nodes alone, and those of pairs: each once, as its slowest rank saw it."""
    found: dict[tuple[str, ...], Sum] = {}
    for one in (one for pace in paces for one in pace.sums):
        known = found.get(one.hosts, one)
        found[one.hosts] = Sum(one.hosts, max(known.seconds, one.seconds), known.right and one.right)
    return [one for one in found.values() if len(one.hosts) == 1], [one for one in found.values() if len(one.hosts) > 1]


def _hosts(sums: Sequence[Sum]) -> list[str]:
    return list(dict.fromkeys(host for one in sums for host in one.hosts))


def _with(host: str, sums: Sequence[Sum]) -> str:
    others = list(dict.fromkeys(name for one in sums if host in one.hosts for name in one.hosts if name != host))
    return f"with {' and '.join(others)}" if others else "within the node"


def _times(seconds: float, usual_s: float) -> str:
    return f"{seconds / usual_s:.1f} times the median ({seconds * 1e3:.1f} ms, not {usual_s * 1e3:.1f})"
