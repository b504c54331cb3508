from __future__ import annotations

import io

import pytest

from hpctrain.data import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines_come_now_and_then(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_progress("packing", 5000) as advance:
        for _ in range(50):
            now[0] += 0.5
            advance(100)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["packing: 2,000 of 5,000, 200 images/s", "packing: 4,000 of 5,000, 200 images/s"]


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr("sys.stdin", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress.show_progress("packing", 10) as advance:
        advance(4)
        advance(6)
    assert "packing" in screen.getvalue()
    assert "10/10" in screen.getvalue()
