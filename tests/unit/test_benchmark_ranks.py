"""What the scripts in benchmarks/ share: a result that could not be kept is refused before anything is measured."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import pytest

from benchmarks.ranks import bare_parser, missing_launcher


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return bare_parser("Nothing.")


def test_a_result_that_could_not_be_written(
    options: argparse.ArgumentParser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "none/result.json"
    with pytest.raises(SystemExit, match="2"):
        options.parse_args(["--json", str(path)])
    assert (
        f"argument --json: the folder of {path} does not exist: make it, or name another file"
        in capsys.readouterr().err
    )


def test_a_result_that_can_be_written(options: argparse.ArgumentParser, tmp_path: Path) -> None:
    assert options.parse_args(["--json", f"{tmp_path}/result.json"]).json == tmp_path / "result.json"


def test_a_launcher_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_launcher("mpi", 2) == "mpirun is not on PATH"
    # One rank needs no launcher, and torchrun is a module.
    assert missing_launcher("mpi", 1) is None
    assert missing_launcher("torch", 2) is None
