"""Download, mend, compile, keep and install: the steps, and what they tell while they last."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from hpctrain.build_horovod.mends import RELEASE, apply_mends, check_digest, mends
from hpctrain.build_horovod.target import Cuda, Target, check_tools, describe, find_cuda, find_torch, output
from hpctrain.errors import MachineError

REPORT_EVERY_S = 20.0
#: what the compiler takes for the largest file, horovod/torch/mpi_ops_v2.cc
GIB_PER_JOB = 2.5
SCRIPTS = sysconfig.get_path("scripts")
PIP = (sys.executable, "-m", "pip")


def run_reporting(
    command: Sequence[str], log: Path, environ: Mapping[str, str], what: str, cwd: Path | None = None
) -> None:
    """Run a long command into ``log``, telling every 20 s how far it is. Raises MachineError with what the log says."""
    started = time.monotonic()
    with log.open("a") as sink:
        child = subprocess.Popen(command, env=environ, cwd=cwd, stdout=sink, stderr=subprocess.STDOUT)
        while child.poll() is None:
            try:
                child.wait(REPORT_EVERY_S)
            except subprocess.TimeoutExpired:
                print(f"  {what}: {time.monotonic() - started:.0f} s, {_progress(log)[:100]}", flush=True)
    if child.returncode != 0:
        raise MachineError(f"{what} failed; from {log}:\n{_errors(log)}\n{_tail(log, 15)}")


def _progress(log: Path) -> str:
    """The newest line that counts what is done, as ninja's "[12/75] …" does, or the newest of all."""
    counted = re.findall(r"^\[\d+/\d+\].*", log.read_text(errors="replace"), re.MULTILINE)
    return counted[-1] if counted else _tail(log, 1)


def _errors(log: Path) -> str:
    """The first lines of compiler, linker and CMake errors: they stand far above the traceback that ends the log."""
    text = log.read_text(errors="replace")
    return "\n".join(re.findall(r"^.*(?:\berror:|CMake Error|undefined reference).*", text, re.MULTILINE)[:10])


def _tail(log: Path, lines: int) -> str:
    written = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "\n".join(written[-lines:])


def build(target: Target, cuda: Cuda | None, folder: Path, environ: Mapping[str, str]) -> Path:
    """Download, mend, compile; the wheel's path in ``folder``, where the log stays too."""
    log = folder / "build.log"
    log.write_text("")
    with tempfile.TemporaryDirectory(prefix="hpctrain-horovod-") as name:
        work = Path(name)
        # Without build isolation: an isolated build would download another torch.
        fetch = ["download", "--no-deps", "--no-binary", "horovod", "--no-build-isolation", "-d", str(work)]
        run_reporting([*PIP, *fetch, f"horovod=={RELEASE}"], log, environ, "downloading Horovod")
        sdist = work / f"horovod-{RELEASE}.tar.gz"
        check_digest(sdist)
        shutil.unpack_archive(sdist, work)
        source = work / f"horovod-{RELEASE}"
        apply_mends(source, mends(target.run_path, target.torch))
        environ = {**environ, **_compile_environ(target)}
        if cuda is not None:
            environ |= _cuda_environ(cuda, work / "nccl")
        # Not `pip wheel`: its verbose mode, the only one that shows progress, passes make's options to ninja.
        command = [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", str(work / "out")]
        run_reporting(command, log, environ, "compiling Horovod", cwd=source)
        built = next((work / "out").glob("*.whl"))
        (folder / "target.json").write_text(json.dumps(asdict(target), indent=2) + "\n")
        partial = Path(shutil.copy(built, folder / f"{built.name}.partial"))
        return partial.rename(folder / built.name)


def _compile_environ(target: Target) -> dict[str, str]:
    memory_gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    jobs = str(max(1, min(len(os.sched_getaffinity(0)), int(memory_gib / GIB_PER_JOB))))
    return {
        "HOROVOD_LOCAL_VERSION": target.local_version,
        "HOROVOD_WITH_PYTORCH": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITHOUT_TENSORFLOW": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        "CMAKE_GENERATOR": "Ninja",
        "CMAKE_BUILD_PARALLEL_LEVEL": jobs,
        # Unset, setup.py would ask for eight jobs.
        "MAKEFLAGS": f"-j{jobs}",
    }


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


def check_build(gpu: bool, environ: Mapping[str, str]) -> None:
    """Raise MachineError unless the installed Horovod says that it has torch, MPI and Gloo (and NCCL)."""
    report = output([os.path.join(SCRIPTS, "horovodrun"), "--check-build"], environ)
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
    command = [*PIP, "install", "--disable-pip-version-check", "--no-deps", "--quiet", str(wheel)]
    run_reporting(command, folder / "install.log", environ, "installing Horovod")
    check_build(gpu, environ)
    print("Horovod works here: torch, MPI, Gloo" + (", NCCL" if gpu else ""))
