"""Who is late, from two readings of all heartbeats: a pure function and the sentence about its answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.comm.side_channel import Heartbeat
from hpctrain.topology.phases import PHASES
from hpctrain.topology.voice import listed

_MOST_NAMED = 4


@dataclass(frozen=True)
class Verdict:
    """The late ranks, and whether their processes give no sign of life at all."""

    late: tuple[Heartbeat, ...]
    others: tuple[Heartbeat, ...]
    silent: bool

    @property
    def accused(self) -> tuple[int, ...]:
        """The late ranks, unless all stand alike: then nobody is."""
        return tuple(beat.rank for beat in self.late) if self.others else ()


def find_late(before: Sequence[Heartbeat], now: Sequence[Heartbeat]) -> Verdict:
    """Judge two readings some seconds apart.

    Ranks whose watch wrote nothing between them are dead, stopped, or hold the interpreter lock: they are late.
    Where all write, those that stand earliest in the program are what the others wait for.
    """
    silent = [late.rank for early, late in zip(before, now, strict=True) if early.count == late.count]
    if silent:
        return _verdict(now, silent, silent=True)
    earliest = min(_position(beat) for beat in now)
    return _verdict(now, [beat.rank for beat in now if _position(beat) == earliest], silent=False)


def describe(verdict: Verdict, waited_s: float, option: str) -> str:
    """One line: how long, who, where, and which option to raise."""
    first = verdict.late[0]
    where = place_of(first)
    life = "its process gives no sign of life" if verdict.silent else f"where it came {first.age_s:.0f} s ago"
    if verdict.others:
        found = f"{_names(verdict.late)} late: {where}, {life}; the others wait in {place_of(verdict.others[0])}"
    else:
        found = f"all {len(verdict.late)} ranks wait in {where}"
    return f"no progress for {waited_s:.0f} s: {found}; raise {option} if that may take so long"


def _names(beats: Sequence[Heartbeat]) -> str:
    names = listed([f"rank {beat.rank} (host {beat.host})" for beat in beats], _MOST_NAMED)
    return f"{names} {'is' if len(beats) == 1 else 'are'}"


def _verdict(beats: Sequence[Heartbeat], late: Sequence[int], *, silent: bool) -> Verdict:
    chosen = set(late)
    return Verdict(
        late=tuple(beat for beat in beats if beat.rank in chosen),
        others=tuple(beat for beat in beats if beat.rank not in chosen),
        silent=silent,
    )


def _position(beat: Heartbeat) -> tuple[int, int, int]:
    return beat.step, PHASES.index(beat.phase), beat.ticks


def place_of(beat: Heartbeat) -> str:
    """Where a rank stood; parts of a phase are counted from 1, and told from the second on."""
    part = f", part {beat.ticks + 1}" if beat.ticks else ""
    return f"step {beat.step}, phase {beat.phase}{part}"
