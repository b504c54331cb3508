"""Whole commands as jobs of several ranks: run to their end, or killed and interrupted on the way."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.needs import needs
from tests.parallel.launch import Run, launch

#: generous: on a busy machine two ranks take a minute to import what they need
LIMIT_S = 200.0
_MARK = "HPCTRAIN_TEST_MARK"
#: where launchers tell a process its rank
_RANK_NAMES = ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK")
_MODULES = {"horovod": ("horovod",), "mpi": ("mpi4py",)}


@dataclass(frozen=True)
class Ranks:
    """Who trains: an engine, under the launcher its users type, on so many ranks."""

    engine: str
    launcher: str
    count: int

    def __str__(self) -> str:
        return f"{self.engine}-{self.launcher}-{self.count}"


def hpctrain(ranks: Ranks, *argv: str | Path, through: Sequence[str] = ("-m", "hpctrain")) -> Run:
    """`hpctrain ARGV` on ``ranks``; ``through`` names another program that calls it."""
    needs(*_MODULES.get(ranks.engine, ()))
    return launch(ranks.launcher, ranks.count, [sys.executable, *through, *map(str, argv)], LIMIT_S)


def train(ranks: Ranks, config: Path, run: Path, *sets: str, through: Sequence[str] = ("-m", "hpctrain")) -> Run:
    """`hpctrain train`, which must end well and leave no process."""
    done = hpctrain(ranks, *train_argv(ranks, config, run, *sets), through=through)
    assert done.returncode == 0, done.output[-6000:]
    assert done.survivors == 0
    return done


def train_argv(ranks: Ranks, config: Path, run: Path, *sets: str) -> list[str]:
    keys = (f"comm.engine={ranks.engine}", *sets)
    return ["train", str(config), "--run-dir", str(run), *(word for key in keys for word in ("--set", key))]


class Job:
    """A command under way. Leaving its block kills what is left of it."""

    def __init__(self, ranks: Ranks, *argv: str | Path) -> None:
        needs(*_MODULES.get(ranks.engine, ()))
        self._mark = uuid.uuid4().hex
        self._pool = ThreadPoolExecutor(1)
        command = [sys.executable, "-m", "hpctrain", *map(str, argv)]
        self._end: Future[Run] = self._pool.submit(
            launch, ranks.launcher, ranks.count, command, LIMIT_S, {_MARK: self._mark}
        )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        while not self._end.done():
            self.kill()
            time.sleep(0.05)
        self._pool.shutdown()

    def wait_until(self, reached: Callable[[], bool]) -> None:
        """Return as soon as ``reached``; AssertionError when the job ends before that."""
        while not reached():
            assert not self._end.done(), self.end().output[-6000:]
            time.sleep(0.002)

    def kill(self) -> None:
        """SIGKILL to every process of the job, launcher and ranks."""
        for process in self._processes():
            process.kill()

    def signal_rank(self, rank: int, number: signal.Signals) -> None:
        """Send ``number`` to the process of one rank, where it is still there."""
        for process in self._processes():
            environ = _environment(process)
            if any(environ.get(name) == str(rank) for name in _RANK_NAMES) and _is_rank(process):
                process.send_signal(number)

    def interrupt(self) -> None:
        """What Ctrl-C at a terminal does: SIGINT to the process group of the launcher."""
        processes = {process.pid: process for process in self._processes()}
        (launcher,) = (process for process in processes.values() if process.ppid() not in processes)
        os.killpg(os.getpgid(launcher.pid), signal.SIGINT)

    def end(self) -> Run:
        return self._end.result()

    def _processes(self) -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if _environment(process).get(_MARK) == self._mark]


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except psutil.Error:
        return {}


def _is_rank(process: psutil.Process) -> bool:
    """The command itself, neither a shell of the launcher's nor a worker of the loader's."""
    try:
        return process.cmdline()[1:3] == ["-m", "hpctrain"]
    except psutil.Error:
        return False


def write_config(path: Path, **sections: Any) -> Path:
    path.write_text(json.dumps(sections))  # JSON is YAML
    return path
