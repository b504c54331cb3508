"""Who is late, judged from two readings of the heartbeats."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from hpctrain.comm.lateness import describe, find_late
from hpctrain.comm.side_channel import Heartbeat
from hpctrain.topology.phases import PHASES, Phase


def beat(rank: int, step: int, phase: Phase, ticks: int = 0, *, age_s: float = 60.0) -> Heartbeat:
    return Heartbeat(rank, f"n{rank}", step, phase, ticks, age_s, count=9)


def judge(before: list[Heartbeat], now: list[Heartbeat]) -> str:
    return describe(find_late(before, now), 60.4, "comm.timeout_s")


def earlier(beats: list[Heartbeat], stuck: tuple[int, ...] = ()) -> list[Heartbeat]:
    """The reading before ``beats``: every rank but ``stuck`` has written since."""
    return [replace(one, count=one.count - (one.rank not in stuck)) for one in beats]


def test_the_rank_that_stands_earliest_is_late() -> None:
    now = [beat(0, 120, "exchange"), beat(1, 120, "data", age_s=62.6), beat(2, 120, "exchange")]
    assert judge(earlier(now), now) == (
        "no progress for 60 s: rank 1 (host n1) is late: step 120, phase data, where it came 63 s ago; the others wait "
        "in step 120, phase exchange; raise comm.timeout_s if that may take so long"
    )


def test_a_rank_one_step_behind_is_late_whatever_its_phase() -> None:
    now = [beat(0, 10, "checkpoint"), beat(1, 11, "data")]
    assert [late.rank for late in find_late(earlier(now), now).late] == [0]


def test_a_silent_process_is_late_wherever_it_stands() -> None:
    now = [beat(0, 5, "exchange"), beat(1, 5, "exchange"), beat(2, 5, "optimizer")]
    text = judge(earlier(now, stuck=(2,)), now)
    assert "rank 2 (host n2) is late: step 5, phase optimizer, its process gives no sign of life" in text


def test_a_rank_is_late_within_the_phase_that_all_are_in() -> None:
    """As in an evaluation, whose batches are parts of one phase, and whose sum all wait for."""
    now = [beat(0, 90, "eval", 20), beat(1, 90, "eval", 2), beat(2, 90, "eval", 20)]
    text = judge(earlier(now), now)
    assert "rank 1 (host n1) is late: step 90, phase eval, part 3, where it came 60 s ago; the others wait in" in text
    assert "the others wait in step 90, phase eval, part 21; raise" in text


def test_parts_of_a_phase_count_less_than_the_phase() -> None:
    now = [beat(0, 90, "eval", 20), beat(1, 90, "checkpoint")]
    assert [late.rank for late in find_late(earlier(now), now).late] == [0]


def test_ranks_that_all_stand_alike_are_not_accused() -> None:
    now = [beat(rank, 7, "exchange") for rank in range(4)]
    assert "all 4 ranks wait in step 7, phase exchange" in judge(earlier(now), now)


def test_many_late_ranks_are_counted() -> None:
    now = [beat(rank, 7, "data" if rank < 6 else "exchange") for rank in range(8)]
    text = judge(earlier(now), now)
    assert "rank 3 (host n3) and 2 more are late: step 7, phase data" in text
    assert "rank 4" not in text


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(PHASES), st.integers(0, 2)), min_size=1, max_size=8))
def test_nobody_stands_before_the_late(places: list[tuple[int, Phase, int]]) -> None:
    now = [beat(rank, *place) for rank, place in enumerate(places)]
    verdict = find_late(earlier(now), now)
    latest = {(late.step, PHASES.index(late.phase), late.ticks) for late in verdict.late}
    assert len(latest) == 1
    assert all((other.step, PHASES.index(other.phase), other.ticks) > min(latest) for other in verdict.others)
    assert len(verdict.late) + len(verdict.others) == len(now)
