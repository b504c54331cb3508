"""The limit of an engine's start: what it says, and whom it leaves alone."""

from __future__ import annotations

import threading

import pytest

from hpctrain.comm import start_limit as module
from hpctrain.comm.patience import Limit
from hpctrain.comm.start_limit import start_limit
from hpctrain.topology.ranks import Topology


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set where the process would have ended."""
    event = threading.Event()
    monkeypatch.setattr(module, "end_process", lambda code: event.set())
    return event


def test_a_start_that_takes_too_long_ends_with_a_sentence(
    ended: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    with start_limit(Topology(1, 4, host="n1"), "auto", Limit(0.2, "comm.startup_timeout_s")) as start:
        start("mpi on cpu")
        assert ended.wait(20)
    assert capsys.readouterr().err == (
        "hpctrain: rank 1 of 4 on host n1 has been waiting 0 s for the engine (mpi on cpu) to start: check that all "
        "ranks were started and that their hosts reach each other, or raise comm.startup_timeout_s\n"
    )


@pytest.mark.parametrize("world_size", [1, 4])
def test_a_start_in_time_and_a_rank_alone_go_on(ended: threading.Event, world_size: int) -> None:
    with start_limit(Topology(0, world_size), "mpi on cpu", Limit(0.2, "comm.timeout_s")):
        assert not ended.wait(0.5 if world_size == 1 else 0)
    assert not ended.wait(0.4)
