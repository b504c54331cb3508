"""The side channel's store, its words and counts, in one process; the watch of a job of one rank."""

from __future__ import annotations

import socket
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hpctrain.comm import side_channel, watch
from hpctrain.comm.patience import Limits
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.comm.side_channel import Heartbeat, LastWords, SideChannel, within
from hpctrain.comm.torch_engine import open_store
from hpctrain.comm.watch import Watch
from hpctrain.errors import MachineError
from hpctrain.topology.ranks import Topology


@pytest.fixture
def channels() -> list[SideChannel]:
    server = open_store("127.0.0.1", 0, serve=True, timeout_s=5)
    client = open_store("127.0.0.1", server.port, serve=False, timeout_s=5)
    return [SideChannel(store, rank, 2, "n0") for rank, store in enumerate((server, client))]


def test_heartbeats_come_in_rank_order(channels: list[SideChannel]) -> None:
    beats = [Heartbeat(rank, f"n{rank}", 3, "data", 0, 0.5, 1) for rank in range(2)]
    for channel, beat in reversed(list(zip(channels, beats, strict=True))):
        channel.beat(beat)
    assert channels[1].heartbeats() == beats
    assert channels[1].heartbeat(0) == beats[0]


def test_one_rank_has_the_last_words(channels: list[SideChannel]) -> None:
    assert channels[0].last_words() is None
    assert channels[1].claim()
    assert not channels[0].claim()
    words = LastWords(1, "n1", 7, "backward", "error", "ValueError: é", 1, late=(0, 5))
    channels[1].write_last_words(words)
    assert channels[0].last_words() == words
    channels[0].acknowledge()
    started = time.monotonic()
    channels[1].wait_acknowledged(5)
    assert time.monotonic() - started < 2


def test_rank_0_leaves_last(channels: list[SideChannel]) -> None:
    left: list[int] = []
    thread = threading.Thread(target=lambda: left.append(channels[0].leave(10) or 0))
    thread.start()
    time.sleep(0.3)
    assert not left
    channels[1].leave(10)
    thread.join(5)
    assert left == [0]


def test_waiting_is_bounded(channels: list[SideChannel]) -> None:
    started = time.monotonic()
    channels[0].wait_acknowledged(0.2)
    assert 0.1 < time.monotonic() - started < 2
    assert not within(0.1, lambda: time.sleep(2))
    assert within(1.0, lambda: None)

    def fail() -> None:
        raise RuntimeError("gone")

    assert not within(1.0, fail)


def test_an_unreachable_rank_0_is_a_fault_with_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_channel, "_TRY_TIMEOUT_S", 0.2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    comm = SerialCommunicator(Topology(host="n3"), torch.device("cpu"))
    text = rf"rank 0 \(host n3\) reaches rank 0 at none of 127.0.0.1, localhost, port {port}"
    with pytest.raises(MachineError, match=text):
        side_channel._reachable(["127.0.0.1", "localhost"], port, comm)


def test_one_rank_needs_no_channel_and_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    comm = SerialCommunicator(Topology(), torch.device("cpu"))
    before = threading.active_count()
    alone = Watch(SideChannel.open(comm), comm, Limits(0.1, 0.1))
    alone.beat(3, "data")
    assert threading.active_count() == before
    assert alone.place == "rank 0 on host localhost, step 3, phase data"
    with pytest.raises(ValueError, match="passes through"), alone.guard():
        raise ValueError("passes through")
    with pytest.raises(SystemExit) as ended, alone.guard():
        raise KeyboardInterrupt
    assert ended.value.code == 130
    alone.report_failure("short", "long")
    assert capsys.readouterr().err == "long\n"
    alone.close()


def test_beating_is_cheap_enough_for_every_phase() -> None:
    comm: Any = SimpleNamespace(rank=0, world_size=1, topology=Topology())
    alone = Watch(SideChannel(None, 0, 1, "n0"), comm, Limits(60, 300))
    best = min(_time_beats(alone) for _ in range(5))
    assert best < 5e-6


def _time_beats(alone: watch.Watch) -> float:
    started = time.perf_counter()
    for step in range(10_000):
        alone.beat(step, "data")
    return (time.perf_counter() - started) / 10_000
