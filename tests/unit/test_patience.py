"""How long a rank waits and what convinces it, with the time and the heartbeats in the test's hand."""

from __future__ import annotations

import pytest

from hpctrain.comm.patience import Limits, Mark, Patience, Reading
from hpctrain.comm.side_channel import Heartbeat
from hpctrain.topology.phases import Phase

LIMITS = Limits(50.0, 50.0)
STEP: Mark = (3, "exchange", 0)


def beats(count: int) -> list[Heartbeat]:
    """What three ranks wrote when each had done so ``count`` times."""
    return [Heartbeat(rank, f"n{rank}", 3, "exchange", 0, 0.0, count) for rank in range(3)]


def read(patience: Patience, asked_s: float, count: int, answered_s: float | None = None) -> None:
    patience.read(Reading(asked_s, asked_s if answered_s is None else answered_s, beats(count)))


def waiting(rank: int, until_s: int, mark: Mark = STEP) -> Patience:
    """A rank that moved on to ``mark`` at 0 s, and has looked each second since."""
    patience = Patience(LIMITS, rank, mark, 0.0)
    for now_s in range(1, until_s + 1):
        patience.look(mark, now_s)
    return patience


@pytest.mark.parametrize(("rank", "first_s"), [(0, 47), (1, 52), (7, 52)])
def test_rank_0_reads_before_the_limit_and_the_others_when_it_has_found_nobody(rank: int, first_s: int) -> None:
    patience = waiting(rank, 0)
    wanted = []
    for now_s in range(1, 61):
        patience.look(STEP, now_s)
        wanted.append(patience.wants_reading(now_s))
    assert wanted == [now_s >= first_s for now_s in range(1, 61)]
    patience.look((4, "data", 0), 61.0)
    assert not patience.wants_reading(61.0)


def test_half_of_a_short_limit_is_left_to_rank_0() -> None:
    patience = Patience(Limits(4.0, 4.0), 0, STEP, 0.0)
    assert not patience.wants_reading(2.0) and patience.wants_reading(2.1)


def test_two_readings_far_enough_apart_are_evidence() -> None:
    patience = waiting(0, 47)
    assert patience.evidence() is None
    for number in range(4):
        read(patience, 47.1 + number, number)
    assert patience.evidence() == (beats(0), beats(3))


def test_a_slow_answer_brings_two_readings_closer_to_each_other() -> None:
    """What was asked for at 47 s may be of 49 s, and a second later not every living process has written again."""
    patience = waiting(0, 50)
    read(patience, 47.0, 0, answered_s=49.0)
    read(patience, 50.0, 0, answered_s=50.1)
    assert patience.evidence() is None
    read(patience, 51.0, 2)
    assert patience.evidence() == (beats(0), beats(2))


def test_a_reading_that_arrives_after_the_rank_moved_on_is_no_evidence_hours_later() -> None:
    """The thread that asks was blocked meanwhile. A process stopped since has gone on counting from then."""
    patience = waiting(0, 47)
    read(patience, 47.1, 1)
    patience.look((4, "data", 0), 48.5)
    read(patience, 48.1, 2, answered_s=48.9)
    patience.look((900, "exchange", 0), 7200.0)
    for now_s in range(7201, 7248):
        patience.look((900, "exchange", 0), now_s)
    read(patience, 7247.5, 5000)
    assert patience.evidence() is None
    read(patience, 7249.5, 5000)
    assert patience.evidence() == (beats(5000), beats(5000))


def test_readings_from_before_the_rank_moved_on_are_forgotten() -> None:
    patience = waiting(0, 50)
    read(patience, 47.1, 1)
    read(patience, 49.5, 3)
    assert patience.evidence() is not None
    patience.look((3, "optimizer", 0), 50.5)
    assert patience.evidence() is None and patience.waited_s(51.0) == 0.5


def test_a_job_that_was_suspended_goes_on() -> None:
    """By Slurm, with a virtual machine, or by SIGSTOP: afterwards every clock has gone on, and nobody has moved."""
    patience = waiting(0, 48)
    read(patience, 47.5, 1)
    patience.look(STEP, 3648.0)
    assert patience.waited_s(3648.0) == pytest.approx(49)
    assert patience.quiet_s(3648.0) == 0
    read(patience, 3648.5, 2)
    assert patience.evidence() is None, "counts from before tell nothing"
    for now_s in range(3649, 3700):
        patience.look(STEP, now_s)
    assert patience.waited_s(3699.0) == pytest.approx(100), "a rank that hangs is found all the same"


def test_a_look_that_is_a_little_late_counts_in_full() -> None:
    patience = waiting(1, 0)
    for now_s in range(4, 84, 4):
        patience.look(STEP, now_s)
    assert patience.waited_s(80.0) == 80


def test_the_keeper_is_quiet_since_it_last_answered() -> None:
    patience = waiting(1, 50)
    assert patience.quiet_s(50.0) == 50
    patience.answered(49.0)
    assert patience.quiet_s(50.0) == 1
    read(patience, 53.0, 1, answered_s=55.5)
    assert patience.quiet_s(56.0) == 0.5


def test_the_short_limit_holds_after_the_first_step_of_a_resumed_run() -> None:
    """Steps of a resumed run begin at any number, and its first one is slow as well."""
    patience = Patience(Limits(60.0, 300.0), 0, (0, "start", 0), 0.0)
    places: list[tuple[int, Phase, float]] = [
        (0, "start", 300), (99, "eval", 300), (100, "data", 300), (100, "exchange", 300), (101, "data", 60),
        (102, "eval", 60),
    ]  # fmt: skip
    for number, (step, phase, limit_s) in enumerate(places, start=1):
        patience.look((step, phase, 0), number)
        option = "comm.timeout_s" if limit_s == 60 else "comm.startup_timeout_s"
        assert patience.limit == (limit_s, option)


@pytest.mark.parametrize("startup_timeout_s", [10.0, 60.0])
def test_a_start_never_has_less_time_than_a_step(startup_timeout_s: float) -> None:
    assert Limits(60.0, startup_timeout_s).start == (60.0, "comm.timeout_s")
