"""What a rank adds to the message of its end: the trace of its engine, and its stack where it is late."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpctrain.comm import evidence as module
from hpctrain.comm.evidence import Evidence


def evidence_of(rank: int, dump_trace: Callable[[], Path | None] = lambda: None) -> Evidence:
    comm: Any = SimpleNamespace(name="torch", rank=rank, dump_trace=dump_trace)
    return Evidence(comm)


def test_a_late_rank_shows_where_it_stands() -> None:
    told = evidence_of(5).lines((1, 5))
    assert told.startswith("\nrank 5 stands at\n") and "in test_a_late_rank_shows_where_it_stands" in told
    assert evidence_of(2).lines((1, 5)) == ""


def test_the_engines_trace_is_written_once_and_told(tmp_path: Path) -> None:
    written: list[Path] = []

    def dump() -> Path:
        written.append(tmp_path / "rank-0")
        return written[-1]

    evidence = evidence_of(0, dump)
    for _ in range(2):
        assert evidence.lines(()) == f"\nthe torch engine's trace of this rank is {tmp_path / 'rank-0'}"
    assert len(written) == 1


def disk_full() -> Path:
    raise OSError("disk full")


def hang() -> Path:
    time.sleep(1)
    return Path()


@pytest.mark.parametrize("dump", [disk_full, hang])
def test_a_trace_that_fails_or_takes_too_long_keeps_nobody(
    dump: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TRACE_S", 0.2)
    assert evidence_of(0, dump).lines(()) == "\nthe torch engine could not write its trace"
