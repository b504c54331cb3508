"""What the threads of the watch make of the side channel, and what they say at the end."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from hpctrain.comm import patience
from hpctrain.comm import watch as module
from hpctrain.comm.patience import Limits
from hpctrain.comm.side_channel import Heartbeat, LastWords
from hpctrain.comm.watch import Watch
from hpctrain.topology.phases import Phase
from hpctrain.topology.ranks import Topology

# The double of a process's end is that of its thread.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")

SOON_S = 0.1
NEVER_S = 3600.0
WAIT_S = 30.0


class Channel:
    """A side channel of three ranks, which stand at ``places`` and write on."""

    server_host = "n0"

    def __init__(self, places: tuple[Phase, ...] = ("exchange", "data", "exchange")) -> None:
        self.found = [Heartbeat(rank, f"n{rank}", 7, phase, 0, 52.0, 1) for rank, phase in enumerate(places)]
        self.written: list[Heartbeat] = []
        self.words: LastWords | None = None
        self.told: LastWords | None = None
        self.acknowledged = False
        #: called where the server is asked for the second time; it may block, or find it gone
        self.later: Callable[[], object] = lambda: None
        self._asked = False

    def beat(self, heartbeat: Heartbeat) -> None:
        self.written.append(heartbeat)

    def heartbeat(self, rank: int) -> Heartbeat:
        if self._asked:
            self.later()
        self._asked = True
        return self.found[rank]

    def heartbeats(self) -> list[Heartbeat]:
        self.found = [replace(beat, count=beat.count + 1) for beat in self.found]
        return self.found

    def last_words(self) -> LastWords | None:
        return self.told

    def claim(self) -> bool:
        return True

    def write_last_words(self, words: LastWords) -> None:
        self.words = words

    def wait_acknowledged(self, timeout_s: float) -> None:
        return

    def acknowledge(self) -> None:
        self.acknowledged = True

    def leave(self, timeout_s: float) -> None:
        return


class Job:
    """Watches of this test, and the status that the first of them ended its process with."""

    def __init__(self) -> None:
        self._watches: list[Watch] = []
        self._ended = threading.Event()
        self._status: int | None = None

    def watch(self, rank: int, channel: Any, timeout_s: float) -> Watch:
        """One of three ranks."""
        comm: Any = SimpleNamespace(name="mpi", rank=rank, world_size=3, topology=Topology(rank, 3, host=f"n{rank}"))
        comm.dump_trace = lambda: None
        self._watches.append(Watch(channel, comm, Limits(timeout_s, timeout_s)))
        return self._watches[-1]

    def end_process(self, code: int) -> NoReturn:
        self._status = code
        self._ended.set()
        raise SystemExit

    def status(self) -> int | None:
        assert self._ended.wait(WAIT_S)
        return self._status

    def close(self) -> None:
        for watch in self._watches:
            watch.close()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Seconds of the watch take a hundredth."""
    monkeypatch.setattr(module, "POLL_S", 0.01)
    # on a busy machine a hundredth of a second may well be three
    monkeypatch.setattr(module, "SILENCE_S", NEVER_S)
    monkeypatch.setattr(patience, "_EVIDENCE_S", 0.02)
    monkeypatch.setattr(patience, "_PRECEDENCE_S", 0.02)
    job = Job()
    monkeypatch.setattr(module, "end_process", job.end_process)
    yield job
    job.close()


def test_heartbeats_tell_where_the_training_thread_stands(job: Job) -> None:
    """To enter a phase again is a sign of life, as is a part of it."""
    channel = Channel()
    watch = job.watch(1, channel, NEVER_S)
    for act, mark in (
        (lambda: watch.beat(3, "data"), (3, "data", 0)),
        (lambda: watch.beat(3, "eval"), (3, "eval", 0)),
        (lambda: watch.beat(3, "eval"), (3, "eval", 1)),
        (lambda: watch.comm.arrive(), (3, "eval", 2)),
        (lambda: watch.beat(4, "eval"), (4, "eval", 0)),
    ):
        act()
        before = len(channel.written)
        deadline = time.monotonic() + WAIT_S
        while len(channel.written) < before + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        last = channel.written[-1]
        assert (last.step, last.phase, last.ticks) == mark
    assert [beat.count for beat in channel.written] == list(range(1, 1 + len(channel.written)))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_any_rank_finds_the_late_one_which_shows_its_stack(
    job: Job, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = Channel()
    job.watch(rank, channel, SOON_S)
    assert job.status() == 1
    assert channel.words is not None and (channel.words.kind, channel.words.late) == ("late", (1,))
    told = capsys.readouterr().err
    assert "rank 1 (host n1) is late: step 7, phase data" in told and "raise comm.timeout_s if" in told
    assert ("rank 1 stands at" in told) == (rank == 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_another_one_finds_late_shows_its_stack(
    job: Job, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    channel = Channel()
    channel.told = LastWords(2, "n2", 7, "exchange", "late", "no progress", 3, late=(0, 1, 3, 4, 5))
    job.watch(rank, channel, NEVER_S)
    assert job.status() == 3
    told = capsys.readouterr().err
    assert "rank 2 on host n2 found no progress; this rank stops" in told and f"rank {rank} stands at" in told
    assert channel.acknowledged


def test_where_all_wait_nobody_shows_a_stack(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    channel = Channel(("exchange", "exchange", "exchange"))
    job.watch(0, channel, SOON_S)
    assert job.status() == 1
    assert channel.words is not None and channel.words.late == ()
    told = capsys.readouterr().err
    assert "all 3 ranks wait in step 7, phase exchange" in told and "stands at" not in told


def test_a_rank_0_that_does_not_answer_is_told_with_where_it_stood(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(patience, "_PRECEDENCE_S", NEVER_S)
    monkeypatch.setattr(module, "SILENCE_S", 0.1)
    channel = Channel(("data", "exchange", "exchange"))
    mended = threading.Event()
    channel.later = mended.wait
    job.watch(2, channel, SOON_S)
    assert job.status() == 1
    assert channel.words is not None and channel.words.late == (0,)
    mended.set()
    pattern = (
        r"no progress for \d+ s: rank 0 \(host n0\), which keeps the side channel, has not answered for \d+ s, last "
        r"seen in step 7, phase data; raise comm\.timeout_s if that may take so long"
    )
    assert re.search(pattern, capsys.readouterr().err)


def test_a_lost_rank_0_is_told_with_where_it_stood(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    channel = Channel(("data", "exchange", "exchange"))

    def gone() -> None:
        raise RuntimeError("connection reset")

    channel.later = gone
    job.watch(2, channel, NEVER_S)
    assert job.status() == 1
    assert capsys.readouterr().err == (
        "[rank 2 on host n2, step 0, phase start] rank 0 (host n0), which keeps the side channel, disappeared without "
        "an error message, last seen in step 7, phase data; stopping\n"
    )
