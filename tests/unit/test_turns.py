"""The agreement on the turn at which all stop: every interleaving ends at one turn, and nobody waits for ever."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.comm import turns as module
from hpctrain.comm.side_channel import SideChannel
from hpctrain.comm.torch_engine import open_store
from hpctrain.comm.turns import Board, Stopped, Turns
from hpctrain.topology.ranks import Topology


@dataclass
class Shared:
    """A board in memory, as the side channel's store would hold it."""

    world_size: int
    reason: str | None = None
    promises: list[int] = field(default_factory=list)

    def propose(self, reason: str) -> None:
        self.reason = self.reason or reason

    def proposal(self) -> str | None:
        return self.reason

    def promise(self, turns: int) -> None:
        self.promises.append(turns)

    def agreed(self) -> int | None:
        return max(self.promises) if len(self.promises) == self.world_size else None


class Rank:
    """A training program that takes one action at a time: begin a turn, or finish it.

    A turn is finished only when all ranks have begun it, as with a collective in its midst.
    """

    def __init__(self, rank: int, board: Board, world_size: int) -> None:
        self.request: str | None = None
        self.turns = Turns(board, Topology(rank, world_size, host=f"n{rank}"), lambda: self.request)
        self.begun = self.finished = 0
        self.stopped: str | None = None

    def act(self, ranks: list[Rank]) -> bool:
        """Do the next thing, where it is possible."""
        if self.stopped is not None:
            return False
        if self.finished < self.begun:
            if any(rank.begun < self.begun for rank in ranks):
                return False
            self.finished += 1
            return True
        if self.turns._promised and not self.turns._agreed.is_set():  # begin would wait
            return False
        try:
            self.turns.begin()
        except Stopped as stopped:
            self.stopped = stopped.reason
        else:
            self.begun += 1
        return True


@given(world_size=st.integers(2, 4), seed=st.integers(0, 2**32), requests=st.integers(1, 4))
def test_no_interleaving_makes_ranks_disagree_or_wait_for_ever(world_size: int, seed: int, requests: int) -> None:
    chance = random.Random(seed)
    board = Shared(world_size)
    ranks = [Rank(rank, board, world_size) for rank in range(world_size)]
    bias = [chance.random() for _ in ranks]  # some threads talk often, some hardly
    silent_for = chance.randrange(100)
    for moment in range(5_000):
        if moment == silent_for:
            for rank in chance.sample(ranks, min(requests, world_size)):
                rank.request = "SIGUSR1"
        rank = chance.choice(ranks)
        if chance.random() < bias[rank.turns._topology.rank] / 2:
            rank.turns.exchange()
        else:
            rank.act(ranks)
        if all(rank.stopped for rank in ranks):
            break
    else:  # however unlikely: nobody was ever asked to talk; then everybody does
        for _ in range(4):
            for rank in ranks:
                rank.turns.exchange()
        while any(rank.act(ranks) for rank in ranks):
            pass
    assert len({rank.finished for rank in ranks}) == 1
    assert all(rank.begun == rank.finished for rank in ranks), "nobody left a collective behind"
    assert len({rank.stopped for rank in ranks}) == 1, "all tell the same reason"
    assert "SIGUSR1 on rank" in str(ranks[0].stopped)


def channels_of(world_size: int) -> list[SideChannel]:
    server = open_store("127.0.0.1", 0, serve=True, timeout_s=20)
    clients = [open_store("127.0.0.1", server.port, serve=False, timeout_s=20) for _ in range(1, world_size)]
    return [SideChannel(store, rank, world_size, "n0") for rank, store in enumerate((server, *clients))]


@pytest.mark.timeout(100)
@pytest.mark.parametrize("world_size", [2, 4])
def test_threads_agree_over_the_store(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a barrier in each turn, and one rank's signal."""
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    barrier = threading.Barrier(world_size)
    asked = threading.Event()
    ends: dict[int, tuple[int, str]] = {}

    def run(channel: SideChannel) -> None:
        mine: Callable[[], str | None] = lambda: "SIGTERM" if channel.rank == 1 and asked.is_set() else None  # noqa: E731
        turns = Turns(channel, Topology(channel.rank, world_size, host="n0"), mine)
        turns.start()
        done = 0
        try:
            while True:
                turns.begin()
                time.sleep(random.random() * 0.01)
                barrier.wait(60)
                done += 1
                if done == 20:
                    asked.set()
        except Stopped as stopped:
            ends[channel.rank] = (done, stopped.reason)
        turns.close()

    channels = channels_of(world_size)
    threads = [threading.Thread(target=run, args=(channel,)) for channel in channels]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(ends) == world_size
    assert len(set(ends.values())) == 1
    assert ends[0][0] >= 20
    assert ends[0][1] == "SIGTERM on rank 1 (host n0)"


def test_one_rank_asks_itself_at_each_turn() -> None:
    rank = Rank(0, Shared(1), 1)
    rank.turns.start()
    rank.turns.begin()
    rank.request = "SIGUSR2"
    with pytest.raises(Stopped, match="^SIGUSR2$"):
        rank.turns.begin()
    rank.turns.close()


def test_the_start_of_a_program_is_no_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit leaves room for two turns: one that holds the start would end the job at once."""
    now_s = iter([1000.0, 1002.0, 1005.0])
    turns = Turns(Shared(1), Topology(), lambda: None)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(now_s)))
    told = []
    for _ in range(3):
        turns.begin()
        told.append(turns.turn_s)
    assert told == [0.0, 2.0, 3.0]


def test_a_channel_that_is_gone_ends_the_thread_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The watch is who ends the job."""

    class Gone(Shared):
        def proposal(self) -> str | None:
            raise RuntimeError("connection reset")

    monkeypatch.setattr(module, "_POLL_S", 0.01)
    turns = Turns(Gone(2), Topology(0, 2), lambda: None)
    turns.start()
    turns.close()
    turns.begin()


def test_a_turn_costs_little() -> None:
    """The bar is 100 microseconds, 0.5 % of a step of 20 ms; the CPU's time counts, so that a busy machine may pass."""
    turns = Turns(Shared(2), Topology(0, 2), lambda: None)
    started_s = time.thread_time()
    for _ in range(20_000):
        turns.begin()
    assert (time.thread_time() - started_s) / 20_000 < 20e-6
