"""What must change in Horovod 0.28.1 before it compiles against a current torch and starts under Open MPI 5.

Data, and how it is applied to the unpacked release; ``build`` does the rest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import MachineError

RELEASE = "0.28.1"
SDIST_SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"

CXX17 = "torch's headers have needed C++17 since 2.1; Horovod's main branch made this change after the release"
CXX20 = "torch's headers have needed C++20 since 2.14"


@dataclass(frozen=True, slots=True)
class Mend:
    """Replace ``old``, which must occur exactly once in the file ``path`` of the release, by ``new``."""

    path: str
    old: str
    new: str
    why: str


def mends(run_path: str, torch_version: str) -> tuple[Mend, ...]:
    """What differs from the release. ``run_path`` is where the built library looks for libmpi, libtorch, libnccl."""
    new_headers = tuple(int(part) for part in torch_version.split(".")[:2]) >= (2, 14)
    standard, why = (20, CXX20) if new_headers else (17, CXX17)
    return (
        Mend("CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", "set(CMAKE_CXX_STANDARD 17)", CXX17),
        Mend("horovod/torch/CMakeLists.txt", "set(CMAKE_CXX_STANDARD 14)", f"set(CMAKE_CXX_STANDARD {standard})", why),
        Mend(
            "CMakeLists.txt",
            "project(horovod CXX)\n",
            f'project(horovod CXX)\nset(CMAKE_BUILD_WITH_INSTALL_RPATH ON)\nset(CMAKE_INSTALL_RPATH "{run_path}")\n',
            "a run path into the environment it was built in would load a second MPI or NCCL in every other one",
        ),
        Mend(
            "horovod/runner/mpi_run.py",
            "_NO_BINDING_ARGS = ['-bind-to none', '-map-by slot']",
            "_NO_BINDING_ARGS = ['--bind-to none', '--map-by slot']",
            "Open MPI 5 reads these options with two dashes only",
        ),
        Mend(
            "horovod/runner/mpi_run.py",
            "_SOCKET_BINDING_ARGS = ['-bind-to socket', '-map-by socket', '-rank-by core']",
            "_SOCKET_BINDING_ARGS = ['--bind-to socket', '--map-by socket', '--rank-by core']",
            "Open MPI 5 reads these options with two dashes only",
        ),
        Mend(
            "horovod/runner/launch.py",
            "def run_commandline():\n",
            "def run_commandline():\n"
            "    os.environ['PATH'] = os.path.dirname(sys.executable) + os.pathsep + os.environ.get('PATH', '')\n",
            "horovodrun called by its path, in an environment not activated, must find the mpirun beside it",
        ),
        Mend(
            "horovod/runner/js_run.py",
            "from distutils.spawn import find_executable",
            "from shutil import which as find_executable",
            "Python 3.12 has no distutils",
        ),
    )


def apply_mends(source: Path, changes: Sequence[Mend]) -> None:
    """Change the unpacked release in place and say so at the head of each file (Apache-2.0, section 4b).

    Raises MachineError when a file is not what a mend was written for.
    """
    for mend in changes:
        path = source / mend.path
        text = path.read_text() if path.is_file() else ""
        if text.count(mend.old) != 1:
            raise MachineError(
                f"{mend.path} of this Horovod has no single line {mend.old.strip()!r}: "
                f"these mends are for release {RELEASE} only"
            )
        notice = f"# Changed by hpctrain, not part of Horovod {RELEASE}: {mend.why}.\n"
        path.write_text(notice + text.replace(mend.old, mend.new))


def check_digest(sdist: Path) -> None:
    """Raise MachineError unless the download is the release that the mends were written for."""
    if hashlib.sha256(sdist.read_bytes()).hexdigest() != SDIST_SHA256:
        raise MachineError(f"the downloaded {sdist.name} is not Horovod's release (its SHA-256 differs)")
