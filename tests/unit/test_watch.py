"""What the watch makes of clocks and heartbeats, with both in the test's hand, and what it says at the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpctrain.comm import watch as module
from hpctrain.comm.side_channel import Heartbeat, LastWords
from hpctrain.comm.watch import Watch
from hpctrain.topology.ranks import Topology

TIMEOUT_S = 50.0


class Ended(Exception):
    """Where the process would have ended."""


class Channel:
    """A side channel of three ranks, whose words are kept here."""

    server_host = "n0"

    def __init__(self) -> None:
        self.words: LastWords | None = None
        self.acknowledged = False

    def claim(self) -> bool:
        return True

    def write_last_words(self, words: LastWords) -> None:
        self.words = words

    def wait_acknowledged(self, timeout_s: float) -> None:
        return

    def acknowledge(self) -> None:
        self.acknowledged = True


def watch_of(rank: int, dump_trace: Callable[[], Path | None] = lambda: None) -> tuple[Watch, Channel]:
    """A watch of three ranks without its threads; its training thread is the test's."""
    comm: Any = SimpleNamespace(name="torch", rank=rank, world_size=1, topology=Topology(rank, 3, host=f"n{rank}"))
    comm.dump_trace = dump_trace
    channel: Any = Channel()
    watch = Watch(channel, comm, TIMEOUT_S, startup_timeout_s=TIMEOUT_S)
    watch._threads = [None]  # type: ignore[list-item]  # as if there were peers
    return watch, channel


@pytest.fixture(autouse=True)
def end(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr(module, "end_process", ended)


def read(watch: Watch, *beats: Heartbeat) -> None:
    """Let the channel's thread have read ``beats`` twice, every process alive."""
    older = [Heartbeat(beat.rank, beat.host, beat.step, beat.phase, beat.ticks, 0.0, 1) for beat in beats]
    watch._readings = [(0.0, older), (module._EVIDENCE_S, list(beats))]


def test_a_job_that_was_suspended_goes_on() -> None:
    """By Slurm, with a virtual machine, or by SIGSTOP: afterwards every clock has gone on, and nobody has moved."""
    watch, _ = watch_of(1)
    now_s = time.monotonic()
    for _ in range(10):
        now_s += 1
        waited_s = watch._measure(now_s)
    assert waited_s == pytest.approx(10, abs=1)
    watch._suspicious.set()
    read(watch, Heartbeat(0, "n0", 3, "data", 0, 0.0, 1))
    now_s += 3600
    assert watch._measure(now_s) == pytest.approx(11, abs=1)
    assert watch._readings == [] and not watch._suspicious.is_set(), "counts from before tell nothing"
    assert watch._answered_at == now_s
    for _ in range(60):
        now_s += 1
        waited_s = watch._measure(now_s)
    assert waited_s == pytest.approx(71, abs=1), "a rank that hangs is found all the same"


def test_a_look_that_is_a_little_late_counts_in_full() -> None:
    watch, _ = watch_of(1)
    now_s = time.monotonic()
    for _ in range(20):
        now_s += 4
        waited_s = watch._measure(now_s)
    assert waited_s == pytest.approx(80, abs=1)


def test_to_enter_a_phase_again_is_a_sign_of_life() -> None:
    watch, _ = watch_of(1)
    marks = []
    for beat in (
        lambda: watch.beat(3, "data"),
        lambda: watch.beat(3, "eval"),
        lambda: watch.beat(3, "eval"),
        watch.comm.arrive,
        lambda: watch.beat(4, "eval"),
    ):
        beat()
        marks.append(watch._mark)
    assert marks == [(3, "data", 0), (3, "eval", 0), (3, "eval", 1), (3, "eval", 2), (4, "eval", 0)]


BEATS = [
    Heartbeat(0, "n0", 7, "exchange", 0, 52.0, 9),
    Heartbeat(1, "n1", 7, "data", 0, 52.0, 9),
    Heartbeat(2, "n2", 7, "exchange", 0, 52.0, 9),
]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_late_rank_shows_its_stack_whoever_finds_it(rank: int, capsys: pytest.CaptureFixture[str]) -> None:
    watch, channel = watch_of(rank)
    read(watch, *BEATS)
    with pytest.raises(Ended):
        watch._end_late(51.0)
    assert channel.words is not None and (channel.words.kind, channel.words.late) == ("late", (1,))
    told = capsys.readouterr().err
    assert "rank 1 (host n1) is late: step 7, phase data" in told
    assert ("rank 1 stands at" in told) == (rank == 1)

    watch, channel = watch_of(rank)
    with pytest.raises(Ended):
        watch._end_after(LastWords(2, "n2", 7, "exchange", "late", "no progress", 1, late=(0, 1, 2, 3, 4, 5)))
    told = capsys.readouterr().err
    assert "rank 2 on host n2 found no progress; this rank stops" in told and f"rank {rank} stands at" in told
    assert channel.acknowledged


def test_where_all_wait_nobody_shows_a_stack(capsys: pytest.CaptureFixture[str]) -> None:
    watch, channel = watch_of(0)
    read(watch, *(Heartbeat(rank, f"n{rank}", 7, "exchange", 0, 52.0, 9) for rank in range(3)))
    with pytest.raises(Ended):
        watch._end_late(51.0)
    assert channel.words is not None and channel.words.late == ()
    told = capsys.readouterr().err
    assert "all 3 ranks wait in step 7, phase exchange" in told and "stands at" not in told


def test_a_lost_rank_0_is_told_with_where_it_stood(capsys: pytest.CaptureFixture[str]) -> None:
    watch, channel = watch_of(2)
    watch._keeper_stood = ", last seen in step 7, phase data"
    watch._answered_at = time.monotonic() - 12
    with pytest.raises(Ended):
        watch._end_late(51.0)
    assert channel.words is not None and channel.words.late == (0,)
    assert (
        "no progress for 51 s: rank 0 (host n0), which keeps the side channel, has not answered for 12 s, last seen in "
        "step 7, phase data; raise comm.timeout_s if that may take so long"
    ) in capsys.readouterr().err
    watch._closing = SimpleNamespace(wait=lambda timeout_s: False)  # type: ignore[assignment]
    with pytest.raises(Ended):
        watch._end_without_store()
    assert capsys.readouterr().err == (
        "[rank 2 on host n2, step 0, phase start] rank 0 (host n0), which keeps the side channel, disappeared without "
        "an error message, last seen in step 7, phase data; stopping\n"
    )


def test_the_engines_trace_is_written_once_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written: list[Path] = []

    def dump() -> Path:
        written.append(tmp_path / "rank-0")
        return written[-1]

    watch, _ = watch_of(0, dump)
    read(watch, *BEATS)
    for _ in range(2):
        with pytest.raises(Ended):
            watch._end_late(51.0)
        assert f"\nthe torch engine's trace of this rank is {tmp_path / 'rank-0'}\n" in capsys.readouterr().err
    assert len(written) == 1


def disk_full() -> Path:
    raise OSError("disk full")


def hang() -> Path:
    time.sleep(1)
    return Path()


@pytest.mark.parametrize("dump", [disk_full, hang])
def test_a_trace_that_fails_or_takes_too_long_keeps_nobody(
    dump: Callable[[], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_TRACE_S", 0.2)
    watch, _ = watch_of(0, dump)
    read(watch, *BEATS)
    with pytest.raises(Ended):
        watch._end_late(51.0)
    assert "\nthe torch engine could not write its trace\n" in capsys.readouterr().err
