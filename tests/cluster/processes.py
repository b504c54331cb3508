"""What tests ask of this machine's processes: whether they run, and to end one that holds a cluster."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
#: with what takes moments on a machine that others do not use
PATIENCE_S = 60.0


def until(condition: Callable[[], bool], limit_s: float = PATIENCE_S) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def running(*words: str) -> list[int]:
    """Processes of this machine whose command line holds all ``words``; the dead that nobody waited for are none."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and set(words) <= set(process.cmdline()):
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def end_owner(program: str, ending: signal.Signals, is_up: Callable[[], bool]) -> str:
    """Send ``ending`` to a python that brings up hosts and prints their shared folder, once ``is_up``; that folder."""
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        shared = owner.stdout.readline().strip()
        assert until(is_up)
        owner.send_signal(ending)
        owner.wait(PATIENCE_S)
    finally:
        owner.kill()
        owner.communicate()
    return shared
