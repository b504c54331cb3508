"""The bench commands and the scripts in benchmarks/, each run small: that they run, verify and leave their JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.commands import Ranks, hpctrain, write_config
from tests.needs import needs
from tests.parallel.launch import ROOT

pytestmark = pytest.mark.timeout(300)

SUITE = [str(ROOT / "benchmarks/gpu_suite.sh"), "--device", "cpu"]


def script(*argv: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(argv, env=environ, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)


@pytest.mark.parametrize("launcher", ["horovodrun", "horovodrun-gloo"])
def test_the_step_is_compared_with_horovod_as_released(launcher: str, tmp_path: Path) -> None:
    needs("mpi4py")
    config = write_config(
        tmp_path / "step.yaml",
        model={"name": "dense", "neurons": 16},
        data={"image_size": 4, "num_classes": 3},
        train={"batch_per_worker": 4, "device": "cpu"},
        log={"every_steps": 2, "tensorboard": False},
    )
    result = tmp_path / "step.json"
    done = hpctrain(Ranks("horovod", launcher, 2), "bench", "step", config, "--rounds", "2", "--json", result)
    assert (done.returncode, done.survivors) == (0, 0), done.output[-6000:]
    record = json.loads(result.read_text())
    assert list(record["variants"]) == ["hpctrain", "bare", "bare_local", "horovod"]
    assert record["unavailable"] == {}
    assert all(apart < 1e-5 for apart in record["verified"]["apart"].values())
    assert set(record["verified"]["apart"]) == {"bare", "horovod"}
    assert len(record["ratios"]["speedup_over_horovod"]["rounds"]) == 2
    assert record["engine"]["versions"]["horovod_controller"] == ("gloo" if launcher.endswith("gloo") else "mpi")
    assert "times the images/s of Horovod's DistributedOptimizer" in done.output


def test_loaders_are_compared(digits: Path, tmp_path: Path) -> None:
    needs("nvidia.dali")
    result = tmp_path / "data.json"
    keys = {
        "data.path": digits,
        "log.every_steps": 2,
        "data.threads": 1,
        "data.crop": "random",
        "train.batch_per_worker": 8,
    }
    sets = [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]
    argv = ["bench", "data", "configs/quickstart.yaml", *sets, "--rounds", "1", "--json", result]
    done = hpctrain(Ranks("serial", "plain", 1), *argv)
    assert done.returncode == 0, done.output[-6000:]
    assert set(json.loads(result.read_text())["variants"]) == {"dali", "bare_dali", "torch"}


def test_the_gpu_suite_leaves_a_summary(tmp_path: Path) -> None:
    done = script(*SUITE, "--out", str(tmp_path), "--limit", "4", "resume", "memory", "gradients", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["passed"]
    assert {row["part"]: row["status"] for row in summary["parts"]} == dict.fromkeys(
        ("resume", "memory", "gradients", "tests"), "passed"
    )
    resume = json.loads((tmp_path / "resume.json").read_text())
    assert resume["bitwise"] == {"resumed": True, "repeated": True}
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert memory["steps"] == 40
    assert memory["memory_slope_bytes_per_step"] is not None
    assert "bytes a step" in summary["parts"][1]["sentence"]
    gradients = json.loads((tmp_path / "gradients.json").read_text())
    assert gradients["gradients"] == {"tensors": 161, "elements": 25557032, "wire": "float16"}
    assert set(gradients["ratios"]) == {"casts", "foreach_copy", "bucket_cast"}


def test_the_gpu_suite_goes_on_after_a_failure_and_stops_in_time(tmp_path: Path) -> None:
    (tmp_path / "environment.json").mkdir()  # where a file should go
    done = script(*SUITE, "--out", str(tmp_path), "--limit", "4", "environment", "tests")
    rows = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [(row["part"], row["status"]) for row in rows] == [("environment", "failed"), ("tests", "passed")]
    assert done.returncode == 1
    done = script(*SUITE, "--out", str(tmp_path), "--limit", "0")
    rows = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert {row["status"] for row in rows} == {"skipped"}
    assert {row["note"] for row in rows} == {"the time was up"}
    assert (done.returncode, len(rows)) == (1, 11)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nonsense"], "there is no part 'nonsense': see --list"),
        (["--device", "tpu"], "--device is cuda or cpu, not 'tpu'"),
        (["--limit", "soon"], "--limit is a number of minutes, not 'soon'"),
        (["--wheels", "/absent"], "there is no folder '/absent'"),
        (["--out"], "--out wants a value"),
        (["--fast"], "there is no option --fast"),
    ],
)
def test_the_gpu_suite_refuses(argv: list[str], message: str) -> None:
    done = script(SUITE[0], *argv)
    assert (done.returncode, done.stderr.strip()) == (2, f"gpu_suite.sh: {message}")


def test_the_gpu_suite_lists_its_parts() -> None:
    done = script(SUITE[0], "--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()][:3] == ["environment", "horovod", "engines-1"]
