"""Settings of the whole suite; what tests share is in ``tests/needs.py`` and ``tests/parallel/launch.py``."""

from __future__ import annotations

import os
import signal
import sysconfig
from pathlib import Path

import pytest
from hypothesis import settings

# Programs beside this interpreter (hpctrain, horovodrun, mpirun) are found in an environment not activated too.
os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
# Several processes share few cores: one thread each, or they wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Open MPI refuses root, as whom containers and CI often run.
os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT", "1")
os.environ.setdefault("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")

# A suite started in the background has SIGINT ignored, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("hpctrain", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("hpctrain")

# What fails fastest comes first.
_FOLDERS = ("unit", "parallel", "integration", "gpu", "cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        folder = item.path.relative_to(Path(__file__).parent).parts[0]
        return _FOLDERS.index(folder) if folder in _FOLDERS else len(_FOLDERS)

    items.sort(key=place)
