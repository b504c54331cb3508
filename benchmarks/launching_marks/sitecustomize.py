"""Notes when a rank of `hpctrain` comes past the stations of its start, without any change to the program.

Every python that finds this folder on PYTHONPATH loads it before anything else. For ``benchmarks.launching`` only.

$HPCTRAIN_MARKS names a folder of all nodes; a rank leaves a file there, ``<command>-<rank>``, with a line a mark: its
name, seconds since the epoch, and the seconds of CPU that the process had used by then.
"""

from __future__ import annotations

import os
import sys
import time
from functools import wraps
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

#: libraries whose imports are told apart; each has in it what it imports first
LIBRARIES = ("numpy", "pydantic", "torch", "nvidia.dali", "mpi4py.MPI", "horovod.torch")
#: functions whose first call is timed, by the module that defines them
CALLS = {
    "hpctrain.doctor.job": ("job_command", "examine_job"),
    "hpctrain.doctor.speed": ("measure",),
    "hpctrain.train.main": ("train_command",),
    "hpctrain.comm.registry": ("choose", "create"),
    "hpctrain.train.run": ("train",),
    "hpctrain.train.build": ("open_data", "build_parts", "build_feeds"),
    "hpctrain.train.parts": ("Parts.to_device",),
    "hpctrain.train.step": ("train_step",),
}


class Marks:
    """The file of this process; a mark counts once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._made: set[str] = set()
        self._write("process.begin", time.time() - _age_s(), 0.0)

    def make(self, name: str) -> None:
        if name not in self._made:
            self._made.add(name)
            self._write(name, time.time(), time.process_time())

    def _write(self, name: str, seconds: float, cpu_s: float) -> None:
        os.write(self._file, f"{name} {seconds:.6f} {cpu_s:.6f}\n".encode())

    def around(self, name: str, action: Any) -> Any:
        """``action``, with a mark before and after it."""

        @wraps(action)
        def marked(*args: Any, **options: Any) -> Any:
            self.make(f"{name}.begin")
            try:
                return action(*args, **options)
            finally:
                self.make(f"{name}.end")

        return marked


class Finder:
    """Finds what the usual finder does, and has the module's loader do more."""

    def __init__(self, marks: Marks) -> None:
        self._marks = marks

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name not in LIBRARIES and name not in CALLS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            load = loader.exec_module
            loader.exec_module = self._marks.around(f"import:{name}", load) if name in LIBRARIES else self._hooked(load)
        return spec

    def _hooked(self, load: Any) -> Any:
        def load_and_hook(module: Any) -> None:
            load(module)
            for dotted in CALLS[module.__name__]:
                *owners, name = dotted.split(".")
                owner = getattr(module, owners[0]) if owners else module
                setattr(owner, name, self._marks.around(dotted, getattr(owner, name)))

        return load_and_hook


def _age_s() -> float:
    """Seconds since this process was started, to 10 ms."""
    with open("/proc/self/stat") as stat:
        started = int(stat.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def _begin() -> None:
    argv, folder = sys.orig_argv, os.environ.get("HPCTRAIN_MARKS")
    if folder is None or "hpctrain" not in argv:
        return
    command = argv[argv.index("hpctrain") + 1]
    if command in ("doctor", "train"):
        sys.meta_path.insert(0, Finder(Marks(f"{folder}/{command}-{os.environ['SLURM_PROCID']}")))


_begin()
