"""What a person sees: plain lines in a log, a bar on a terminal that is left as it was."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpctrain.metrics import progress
from hpctrain.metrics.progress import Display, PlainDisplay, SilentDisplay, Summary, make_display
from hpctrain.metrics.steplog import EvalFigures, StepFigures

ROOT = Path(__file__).parents[2]
STEP = StepFigures(step=1200, epoch=2.4, loss=2.1338, lr=0.4, images_per_s=811.9, phases_s={})
EVAL = EvalFigures(step=1500, epoch=3.0, loss=1.25, top1=0.4512, top5=0.7, seen=50_000, seconds=12.34)
SUMMARY = Summary(
    top1=0.9722, top5=1.0, images_per_s=812.3, minutes=1.26, picture=Path("r/learning_curve.png"), record=Path("r/x")
)


def show(display: Display) -> None:
    display.start("quickstart", [("ranks", "2"), ("global batch", "64")])
    display.step(STEP)
    display.evaluation(EVAL)
    display.message("checkpoint step-001500 saved")
    display.close()
    display.finish(SUMMARY)


def test_plain_lines_read_well_in_a_log(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 100.0, 1300.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(moments))
    stream = io.StringIO()
    show(make_display(True, epochs=90, total_steps=45_000, stream=stream))
    # 1,200 steps in 1,200 s: one second for each of the 43,800 left.
    assert stream.getvalue().splitlines() == [
        "quickstart",
        "  ranks         2",
        "  global batch  64",
        "epoch 3/90 step 1200/45000 loss 2.134 lr 0.4 812 img/s ETA 12:10:00",
        "epoch 3/90 step 1500 evaluation: top-1 45.12 % top-5 70.00 % loss 1.25 on 50000 samples in 12.3 s",
        "checkpoint step-001500 saved",
        "finished",
        "  top-1     97.22 %",
        "  top-5     100.00 %",
        "  images/s  812 (median)",
        "  minutes   1.3",
        "  picture   r/learning_curve.png",
        "  record    r/x",
    ]


def test_time_left_counts_only_steps_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([0.0, 0.0, 400_000.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(moments))
    stream = io.StringIO()
    display = make_display(True, epochs=90, total_steps=2200, first_step=200, stream=stream)
    display.start("", [])
    display.step(STEP)
    assert stream.getvalue().splitlines()[-1].endswith("ETA 4 days, 15:06:40")


def test_figures_that_are_missing_do_not_stop_the_display() -> None:
    stream = io.StringIO()
    display = make_display(True, epochs=1, total_steps=10, stream=stream)
    nan = float("nan")
    display.step(StepFigures(step=10, epoch=1.0000000001, loss=nan, lr=0.0, images_per_s=nan, phases_s={}))
    display.finish(Summary(None, None, nan, 0.0, None, None))
    assert stream.getvalue().startswith("epoch 1/1 step 10/10 loss nan lr 0 nan img/s ETA 0:00:00\n")
    assert "top-1     -" in stream.getvalue()
    assert "picture" not in stream.getvalue()


def test_letters_the_locale_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    display = make_display(True, epochs=1, total_steps=1, stream=io.TextIOWrapper(raw, encoding="ascii"))
    display.message("data in /scratch/Jürgen")
    assert raw.getvalue() == b"data in /scratch/J\\xfcrgen\n"


def test_lines_leave_a_block_buffered_pipe_at_once() -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w", buffering=1 << 16) as stream, os.fdopen(read_end, "rb", buffering=0) as reader:
        make_display(True, epochs=1, total_steps=1, stream=stream).message("now")
        assert select.select([reader], [], [], 0)[0]


def test_other_ranks_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    display = make_display(False, epochs=1, total_steps=1)
    assert isinstance(display, SilentDisplay)
    show(display)
    assert capfd.readouterr() == ("", "")


def test_terminal_given_by_a_launcher_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert isinstance(make_display(True, epochs=1, total_steps=1, stream=Terminal()), PlainDisplay)
    monkeypatch.setattr(sys, "stdin", None)
    assert isinstance(make_display(True, epochs=1, total_steps=1, stream=Terminal()), PlainDisplay)


PROGRAM = """
import time
from contextlib import closing
from dataclasses import replace
from tests.unit.test_progress import EVAL, STEP, SUMMARY
from hpctrain.metrics.progress import make_display
with closing(make_display(True, epochs=90, total_steps=45_000)) as display:
    display.start("quickstart", [("data", "/scratch/[red]set[/red]")])
    display.step(STEP)
    display.evaluation(EVAL)
    display.message("checkpoint [bold] saved")
    time.sleep({pause_s})
display.finish(SUMMARY)
"""


def run_on_terminal(pause_s: float, interrupt: bool) -> tuple[int, str]:
    """Exit status of the program above and all that its terminal received."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", PROGRAM.format(pause_s=pause_s)]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    child = subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    received = b""
    deadline_s = time.monotonic() + 60
    try:
        while time.monotonic() < deadline_s:
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    received += os.read(ours, 65_536)
                except OSError:  # the other end was closed
                    break
            if interrupt and b"checkpoint" in received:
                child.send_signal(signal.SIGINT)
                interrupt = False
        return child.wait(timeout=10), received.decode()
    finally:
        child.kill()
        os.close(ours)


def test_terminal_shows_bar_and_text() -> None:
    status, received = run_on_terminal(pause_s=0.0, interrupt=False)
    assert status == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", received)
    for text in (
        "data  /scratch/[red]set[/red]", "epoch 3/90 step 1200/45000", "loss 2.134 lr 0.4 812 img/s", "━", "ETA ",
        "top-1 45.12 %", "checkpoint [bold] saved", "top-1     97.22 %", "r/learning_curve.png",
    ):  # fmt: skip
        assert text in plain
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l"), "the cursor is shown again"


def test_interrupt_leaves_the_terminal_as_it_was() -> None:
    status, received = run_on_terminal(pause_s=60.0, interrupt=True)
    assert status == -signal.SIGINT
    assert "KeyboardInterrupt" in received
    assert received.rindex("\x1b[?25h") > received.rindex("\x1b[?25l")
