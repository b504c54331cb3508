"""Ranks that hold the others up: found in the seconds that each rank's own work takes, by comparison with its peers.

In synchronous training all ranks' steps last equally long; the slow rank is the one that does not wait. So waiting
(the exchange) is left out, and what all ranks do together outside of steps (evaluation, checkpoints) with it: there
a slow rank cannot be told from one that waits for it. Who gathers the seconds is the journal; this module judges.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from hpctrain.metrics.spread import robust_deviation
from hpctrain.topology.phases import OWN_PHASES

#: Steps that a judgement is made of, at least: the median of fewer is moved by a single hiccup.
MIN_STEPS = 5

#: A rank is slow from here on, as a multiple of its peers' median …
_MIN_FACTOR = 1.2
#: … and until its work is down to this one, so that a rank at the limit is not named again and again.
_END_FACTOR = 1.1
#: Steps of a millisecond differ by more than a factor, and nobody minds.
_MIN_EXCESS_S = 0.002
#: The peers' own spread, in standard deviations, that a slow rank must stand out from.
_SPREADS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One slow rank: seconds of its own work a step, the median of its peers', and the phase that most of it is in."""

    rank: int
    phase: str
    own_s: float
    peers_s: float

    @property
    def factor(self) -> float:
        """How many times as long as its peers it works."""
        return self.own_s / self.peers_s if self.peers_s else float("inf")


@dataclass(frozen=True, slots=True)
class Straggler:
    """A rank that was slow from ``first_step`` to ``last_step``; ``factor`` and ``phase`` are of its worst interval."""

    rank: int
    host: str
    phase: str
    factor: float
    first_step: int
    last_step: int

    def to_line(self) -> dict[str, Any]:
        """As it stands in ``steps.jsonl`` and ``record.json``."""
        return asdict(self)


def find_stragglers(seconds: np.ndarray, known: Collection[int] = ()) -> list[Finding]:
    """The ranks whose work holds the others up, by rank.

    ``seconds`` [ranks, phases] float64 are those of ``OWN_PHASES`` a step. A rank is compared with the median and the
    median absolute deviation of all others, so that it counts at two ranks too; where as many are slow as not, the
    slow ones are named, and more than half are the norm. Ranks ``known`` to be slow stay so until they have caught up.
    """
    work = seconds.sum(axis=1)
    if len(work) < 2 or not np.isfinite(work).all():
        return []
    # Without any one of the ranks, the median of the others is this at least; so few are worth a closer look.
    middle = (len(work) - 2) // 2
    suspects = np.flatnonzero(work > _END_FACTOR * np.partition(work, middle)[middle])
    return [found for rank in suspects.tolist() if (found := _judge(seconds, work, rank, rank in known))]


def _judge(seconds: np.ndarray, work: np.ndarray, rank: int, known: bool) -> Finding | None:
    peers = np.delete(work, rank)
    usual = float(np.median(peers))
    factor, spreads = (_END_FACTOR, 0.0) if known else (_MIN_FACTOR, _SPREADS)
    if work[rank] - usual <= max((factor - 1) * usual, spreads * robust_deviation(peers), _MIN_EXCESS_S):
        return None
    excess = seconds[rank] - np.median(np.delete(seconds, rank, axis=0), axis=0)
    return Finding(rank, OWN_PHASES[int(excess.argmax())], float(work[rank]), usual)


class StragglerWatch:
    """Follows the ranks of one launch through its judgements; ``hosts`` [ranks] are where they run."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._slow: dict[int, Straggler] = {}

    def judge(self, seconds: np.ndarray, first_step: int, last_step: int) -> list[str]:
        """Take the ranks' ``seconds`` (see ``find_stragglers``) of the steps named, counted from 1.

        Returns a sentence for each rank that has become slow or has caught up since the last call.
        """
        found = {finding.rank: finding for finding in find_stragglers(seconds, self._slow)}
        told = [_caught_up(self._slow.pop(rank)) for rank in sorted(self._slow.keys() - found.keys())]
        for rank, finding in found.items():
            now = Straggler(rank, self._hosts[rank], finding.phase, finding.factor, first_step, last_step)
            before = self._slow.get(rank)
            if before is None:
                told.append(_fell_behind(now, finding))
            else:
                worst = max(before, now, key=lambda straggler: straggler.factor)
                now = replace(worst, first_step=before.first_step, last_step=last_step)
            self._slow[rank] = now
        return told

    @property
    def slow(self) -> tuple[Straggler, ...]:
        """Those that are slow now, by rank."""
        return tuple(self._slow[rank] for rank in sorted(self._slow))


def stragglers_of(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All stragglers of a run, from the lines of its ``steps.jsonl``, each as it was last seen, in order of steps."""
    seen = {(entry["rank"], entry["first_step"]): entry for line in lines for entry in line.get("stragglers", ())}
    return sorted(seen.values(), key=lambda entry: (entry["first_step"], entry["rank"]))


def _fell_behind(straggler: Straggler, finding: Finding) -> str:
    return (
        f"rank {straggler.rank} on host {straggler.host} holds the others up: its own work takes "
        f"{1000 * finding.own_s:.3g} ms a step, {straggler.factor:.2f} times that of the others "
        f"({1000 * finding.peers_s:.3g} ms), most of the difference in {straggler.phase}"
    )


def _caught_up(straggler: Straggler) -> str:
    return (
        f"rank {straggler.rank} on host {straggler.host} holds nobody up any more: it was slow from step "
        f"{straggler.first_step} to {straggler.last_step}, up to {straggler.factor:.2f} times the others, "
        f"mostly in {straggler.phase}"
    )
