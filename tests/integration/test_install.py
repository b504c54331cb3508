"""`pip install .` alone: without Horovod, DALI, mpi4py and CuPy the package imports, shows help and trains."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = ("horovod", "mpi4py", "nvidia.dali", "cupy", "pynvml", "sklearn")
# Imported by every Python that finds it: makes this environment look like one where only the core was installed.
WITHOUT_EXTRAS = f"""
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    absent = any(name == other or name.startswith(other + ".") for other in {OPTIONAL!r})
    return None if absent else find(name, path, target)

PathFinder.find_spec = find_spec
"""
CONFIG = """
model: {name: dense, neurons: 8}
data: {loader: synthetic, image_size: 8, num_classes: 3, synthetic_samples: 64}
train: {epochs: 1, batch_per_worker: 8, max_steps: 3}
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but this package as its wheel installs it."""
    folder, source = tmp_path_factory.mktemp("installed"), tmp_path_factory.mktemp("source")
    # A build leaves files beside the source, which the next one would pack.
    shutil.copytree(ROOT / "hpctrain", source / "hpctrain", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", folder, source], check=True, timeout=120)
    (folder / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    return folder


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=cwd, env=environ, capture_output=True, text=True, timeout=100, check=False
    )


def test_the_wheel_is_what_runs_and_the_extras_are_absent(installed: Path, tmp_path: Path) -> None:
    code = (
        "import importlib.util, hpctrain.cli\n"
        f"for name in {OPTIONAL!r}:\n"
        "    try:\n        __import__(name)\n    except ModuleNotFoundError:\n        continue\n"
        "    raise SystemExit(name)\n"
        "print(hpctrain.__file__)"
    )
    (tmp_path / "show.py").write_text(code)
    done = run(installed, tmp_path, "show")
    assert (done.returncode, done.stdout.strip()) == (0, str(installed / "hpctrain" / "__init__.py")), done.stderr


def test_help_is_shown(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "hpctrain", "--help")
    assert done.returncode == 0, done.stderr
    for command in ("train", "eval", "data", "bench", "doctor"):
        assert command in done.stdout


@pytest.mark.parametrize(
    ("engine", "launcher"),
    [
        ("serial", ("hpctrain",)),
        ("torch", ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hpctrain")),
    ],
)
def test_it_trains(installed: Path, tmp_path: Path, engine: str, launcher: tuple[str, ...]) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    done = run(installed, tmp_path, *launcher, "train", "config.yaml", "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["engine"]["name"] == engine
    assert record["plan"]["world_size"] == (2 if engine == "torch" else 1)


def test_the_doctor_finds_auto_sound_and_names_what_is_missing(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, "hpctrain", "doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    works = {answer["name"]: answer["ok"] for answer in (*report["engines"], *report["loaders"])}
    # Both an engine and a loader are called torch.
    assert works == {"horovod": False, "mpi": False, "dali": False, "torch": True, "serial": True, "synthetic": True}
    assert all(answer["remedy"] for answer in report["engines"] if not answer["ok"])
