"""slurm/scaling.sh with a Slurm that only writes down what it is asked: which jobs, in what words, and the report."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.unit.scaling_runs import write_run

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm/scaling.sh"
# A call starts a dozen processes, which takes minutes where other work has the cores.
pytestmark = pytest.mark.timeout(600)

#: an override that a shell must not look into: it would make a file
ODD = 'data.path=it\'s $(touch never) "a b"'

_FAKE = """#!{python}
import json, os, sys
from pathlib import Path
log = Path({log!r})
calls = log.read_text().splitlines() if log.exists() else []
with log.open("a") as stream:
    stream.write(json.dumps([Path(sys.argv[0]).name, *sys.argv[1:], os.environ.get("HPCTRAIN_RUNS")]) + "\\n")
if len(calls) == int(os.environ.get("REFUSE_CALL", -1)):
    sys.exit("sbatch: error: Batch job submission failed: Requested time limit is invalid")
print(101 + len(calls))
"""


@dataclass(frozen=True)
class Slurm:
    """A login node: `hpctrain` and Slurm's commands on PATH, a recipe, a site without GPUs."""

    folder: Path
    environ: dict[str, str] = field(default_factory=dict)

    def scaling(self, *words: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
        """scaling.sh with ``words``, in this folder."""
        return subprocess.run(
            ["bash", str(SCRIPT), *map(str, words)],
            capture_output=True, text=True, timeout=500, check=False, cwd=self.folder, env=self.environ | environ,
        )  # fmt: skip

    @property
    def calls(self) -> list[list[str]]:
        """What Slurm was asked, in order: the words of each command, and HPCTRAIN_RUNS."""
        log = self.folder / "calls.jsonl"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    binaries = tmp_path / "bin"
    binaries.mkdir()
    program = f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m hpctrain "$@"\n'
    fake = _FAKE.format(python=sys.executable, log=str(tmp_path / "calls.jsonl"))
    for name, text in {"hpctrain": program, "sbatch": fake, "scancel": fake}.items():
        (binaries / name).write_text(text)
        (binaries / name).chmod(0o755)
    (tmp_path / "small.yaml").write_text("model: {name: dense}\ntrain: {batch_per_worker: 32}\n")
    site = "HPCTRAIN_GRES=none\nHPCTRAIN_CPUS_PER_NODE=8\nHPCTRAIN_PARTITION=long\nHPCTRAIN_ACCOUNT=us\n"
    (tmp_path / "cpu.env").write_text(site)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "HPCTRAIN_"))}
    path = f"{binaries}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    return Slurm(tmp_path, kept | {"PATH": path, "HPCTRAIN_SITE": str(tmp_path / "cpu.env")})


def value_of(call: list[str], option: str) -> str:
    (found,) = [word.partition("=")[2] for word in call if word.startswith(f"{option}=")]
    return found


def test_a_job_for_each_size_and_repeat_then_a_report(slurm: Slurm) -> None:
    done = slurm.scaling(
        "small.yaml", "1x1", 1, 2, "--tasks-per-node", 2, "--repeats", 2, "--out", "my runs", "--", ODD
    )
    assert (done.returncode, done.stderr) == (0, "")
    *jobs, report = slurm.calls
    sizes = [(value_of(job, "--nodes"), value_of(job, "--ntasks-per-node"), value_of(job, "train.batch_per_worker"))
             for job in jobs]  # fmt: skip
    once = [("1", "1", "32"), ("1", "2", "16"), ("1", "2", "32"), ("2", "2", "8"), ("2", "2", "32")]
    assert sizes == once * 2
    folder = slurm.folder / "my runs"
    assert all(job[-1] == str(folder) and ODD in job for job in jobs)
    assert not (slurm.folder / "never").exists()
    assert value_of(report, "--dependency") == "afterany:" + ":".join(str(101 + number) for number in range(10))
    assert (value_of(report, "--partition"), value_of(report, "--account")) == ("long", "us")
    assert report[-2] == str(folder / "report.sbatch")
    for number in range(10):
        assert f"job {101 + number}: " in done.stdout and str(folder / f"small-{101 + number}") in done.stdout


def test_the_report_is_made_of_the_runs_of_these_jobs(slurm: Slurm) -> None:
    out = slurm.folder / "it's runs"
    assert (
        slurm.scaling("small.yaml", 1, 2, 4, "--weak", "--tasks-per-node", 1, "--repeats", 1, "--out", out).returncode
        == 0
    )
    write_run(out / "small-101", 1, 100.0)
    write_run(out / "small-102", 2, 180.0, nodes=2)
    # Job 103 has failed.
    write_run(out / "of another day", 4, 1.0)
    environ = slurm.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        ["bash", str(out / "report.sbatch")], capture_output=True, text=True, timeout=60, check=False, env=environ
    )
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads((out / "report/scaling.json").read_text())["series"][0]["points"]
    assert [row["against"]["workers"]["efficiency"] for row in rows] == pytest.approx([1.0, 0.9])
    text = (out / "report/scaling.txt").read_text()
    assert "90.0%" in text and "small-103 is left out: it has no record.json" in " ".join(text.split())


@pytest.mark.parametrize(("mode", "batches"), [("--strong", ["32", "16"]), ("--weak", ["32", "32"])])
def test_one_kind_of_scaling_alone(slurm: Slurm, mode: str, batches: list[str]) -> None:
    assert slurm.scaling("small.yaml", 1, 2, "--tasks-per-node", 1, mode, "--repeats", 1).returncode == 0
    assert [value_of(job, "train.batch_per_worker") for job in slurm.calls[:-1]] == batches


def test_without_a_size_of_one_worker_it_says_how_to_ask_for_it(slurm: Slurm) -> None:
    told = "the smallest size has 2 workers, and efficiency will be against it: add the size 1x1 to have it against one"
    options = ("--tasks-per-node", 2, "--repeats", 1, "--dry-run")
    assert slurm.scaling("small.yaml", 1, 2, *options).stdout.startswith(told)
    assert "the smallest size" not in slurm.scaling("small.yaml", "1x1", 1, *options).stdout


def test_a_configuration_cannot_be_taken_for_options(slurm: Slurm) -> None:
    odd = "data.path=/a\nb --nodes=7 --ntasks-per-node=7 --account=them"
    done = slurm.scaling("small.yaml", 1, 2, "--tasks-per-node", 1, "--weak", "--repeats", 1, "--", odd)
    assert done.returncode == 0, done.stderr
    *jobs, report = slurm.calls
    assert [value_of(job, "--nodes") for job in jobs] == ["1", "2"] and all(odd in job for job in jobs)
    assert value_of(report, "--account") == "us"


def test_dry_run_prints_everything_and_submits_nothing(slurm: Slurm) -> None:
    before = set(slurm.folder.iterdir())
    done = slurm.scaling("small.yaml", 1, 2, "--tasks-per-node", 2, "--repeats", 2, "--dry-run", "--", "seed=3")
    assert (done.returncode, done.stderr, slurm.calls, set(slurm.folder.iterdir())) == (0, "", [], before)
    assert done.stdout.count("sbatch --parsable") == 2 * 3 + 1
    assert done.stdout.count("seed=3") == 2 * 3
    assert "--dependency=afterany:" in done.stdout and "scaling report" in done.stdout


def test_no_job_is_left_when_one_is_refused(slurm: Slurm) -> None:
    done = slurm.scaling("small.yaml", 1, 2, "--tasks-per-node", 2, REFUSE_CALL="2")
    assert done.returncode == 2
    assert "Requested time limit is invalid" in done.stderr and "are cancelled: 101 102" in done.stderr
    assert slurm.calls[-1][:-1] == ["scancel", "101", "102"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml", "1", "2"], "the configuration none.yaml cannot be read"),
        (["small.yaml"], "no sizes given"),
        (["small.yaml", "1"], "a scaling series needs at least two sizes, not only 2 workers"),
        (["small.yaml", "1", "two"], "two is neither a size"),
        (["small.yaml", "1", "2", "--both"], "--both is neither a size"),
        (["small.yaml", "1", "2", "--repeats", "0"], "--repeats is 0: give a number from 1 up"),
        (["small.yaml", "1", "2", "--repeats"], "--repeats wants a value behind it"),
        (["small.yaml", "1x4", "2"], "2 and 1x4 are both 4 workers: leave one out"),
        (["small.yaml", "1", "3", "--", "train.batch_per_worker=16"], "which does not divide among 6"),
        (["small.yaml", "1", "2", "--", "train.bach=1"], "train.bach"),
        (["small.yaml", "1", "9x9"], "9 ranks a node are more than its 8 CPUs"),
    ],
)
def test_what_cannot_be_submitted_is_one_sentence(slurm: Slurm, words: list[str], message: str) -> None:
    config, *rest = words
    cut = rest.index("--") if "--" in rest else len(rest)
    placed = [*rest[:cut], *([] if "--repeats" in rest[-1:] else ["--tasks-per-node", "2"]), *rest[cut:]]
    done = slurm.scaling(config, *placed)
    assert (done.returncode, done.stdout, slurm.calls) == (2, "", [])
    assert message in done.stderr and done.stderr.count("\n") == 1


def test_without_hpctrain_it_says_so(slurm: Slurm) -> None:
    (slurm.folder / "bin/hpctrain").unlink()
    clean = ":".join(part for part in slurm.environ["PATH"].split(":") if shutil.which("hpctrain", path=part) is None)
    done = slurm.scaling("small.yaml", 1, 2, PATH=clean)
    assert done.returncode == 2 and "hpctrain is not on PATH: activate its environment here" in done.stderr
