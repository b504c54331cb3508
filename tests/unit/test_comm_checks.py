"""Errors that engines share, and those that come before ranks can talk."""

from __future__ import annotations

import socket

import pytest

from hpctrain.comm.checks import faults, require_same_world
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import Topology
from hpctrain.topology.voice import listed, report_early

PLACE = Topology(rank=2, world_size=4, host="n7", launcher="srun")


def test_an_engines_error_becomes_a_fault_with_its_place() -> None:
    with (
        pytest.raises(MachineError, match=r"^mpi all_reduce failed on rank 2 \(host n7\): peer lost$") as caught,
        faults(PLACE, "mpi", "all_reduce", OSError),
    ):
        raise OSError("peer lost\nat some place of a library")
    assert isinstance(caught.value.__cause__, OSError)


def test_a_programming_error_stays_what_it_is() -> None:
    with pytest.raises(ZeroDivisionError), faults(PLACE, "mpi", "all_reduce", OSError):
        raise ZeroDivisionError


def test_an_error_without_words_is_called_by_its_name() -> None:
    with pytest.raises(MachineError, match="TimeoutError$"), faults(PLACE, "mpi", "barrier", TimeoutError):
        raise TimeoutError


def test_singletons_under_srun_are_refused_with_both_numbers() -> None:
    text = "srun says rank 2 of 4 but the mpi engine came up as rank 0 of 1: start it with srun --mpi=pmix"
    with pytest.raises(UserError, match=text):
        require_same_world(PLACE, "mpi", 0, 1, "start it with srun --mpi=pmix")
    require_same_world(PLACE, "mpi", 2, 4, "")


def test_an_early_error_is_printed_by_rank_0_first(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("hpctrain.topology.voice.time.sleep", waits.append)
    assert report_early(UserError("no such file"), {"RANK": "0", "WORLD_SIZE": "2"}) == 2
    assert waits == []
    assert report_early(MachineError("disk full"), {"RANK": "1", "WORLD_SIZE": "2"}) == 1
    assert len(waits) == 1
    assert report_early(UserError("bad"), {"RANK": "x", "WORLD_SIZE": "2"}) == 2
    host = socket.gethostname()
    assert capsys.readouterr().err.splitlines() == [
        "hpctrain: no such file",
        f"[rank 1 on host {host}] hpctrain: disk full",
        "hpctrain: bad",
    ]


def test_of_many_names_the_first_are_listed_and_the_others_counted() -> None:
    assert listed(["n0", "n1"], 2) == "n0, n1"
    assert listed([0, 1, 2, 3, 4], 2) == "0, 1 and 3 more"
