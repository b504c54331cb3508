"""Stand-ins for Slurm's commands around a job script that bash runs, and what they were called with."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.unit.slurm_doubles import Calls, Double

SLURM = Path(__file__).resolve().parents[3] / "slurm"
TRAIN = SLURM / "train.sbatch"
JOB = {
    "SLURM_JOB_ID": "30077",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_CPUS_PER_TASK": "2",
    "SLURM_CPUS_ON_NODE": "8",
    "SLURM_SUBMIT_DIR": str(SLURM.parent),
}
VERSION = ["-m", "hpctrain", "--version"]
GPUS = {"SLURM_GPUS_ON_NODE": "4"}
#: srun's answer, of which nothing is recorded
MPI_LIST = (
    "[[ $1 != --mpi=list ]] || { printf 'MPI plugin types are...\\n\\tpmix\\nversions: pmix_v3,pmix_v4\\n' && exit; }"
)
#: what the data set of ``packed`` is copied to, on a node whose disk is /disk
STAGED = f"/disk/a set-{hashlib.sha256(b'{}').hexdigest()[:12]}"


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a configuration, and Slurm's commands in its bin."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "small.yaml").write_text("model: {name: dense}\n")
    Double(tmp_path / "bin", "srun", first=MPI_LIST)
    Double(tmp_path / "bin", "scontrol", stdout="127.0.0.1\nn2\n")
    Double(tmp_path / "bin", "scancel")
    Double(tmp_path / "bin", "python")
    return tmp_path


def write_srun(job: Path, script: str) -> None:
    """In bash; nothing is recorded."""
    (job / "bin/srun").write_text(f"#!/bin/bash\n{MPI_LIST}\n{script}")


def environment(job: Path, more: Mapping[str, str]) -> dict[str, str]:
    merged = {**JOB, "PATH": f"{job}/bin:/usr/bin:/bin", **more}
    return {name: value for name, value in merged.items() if value}


def run(job: Path, *arguments: str, script: Path = TRAIN, **more: str) -> subprocess.CompletedProcess[str]:
    env = environment(job, more)
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=job, env=env, capture_output=True, text=True, timeout=60, check=False
    )


def recorded(job: Path, name: str) -> Calls:
    return Calls(job / "bin", name)


def option(argv: Sequence[str], name: str) -> str:
    return next(word.partition("=")[2] for word in argv if word.startswith(f"{name}="))


def of_slurm(job: Path, script: Path) -> Path:
    """The copy of a job script that Slurm starts on a node."""
    return Path(shutil.copy(script, job / "slurm_script"))


def entered(job: Path, argv: list[str], *folders: Path, gpus: bool = False) -> list[str]:
    """What is started in the container, which is entered with these folders."""
    binds = [word for folder in folders for word in ("--bind", str(folder))]
    words = ["apptainer", "exec", "--env", "PMIX_MCA_gds=hash", *(["--nv"] if gpus else []), *binds, "my image.sif"]
    first = argv.index("apptainer")
    assert argv[first : first + len(words)] == words
    return argv[first + len(words) :]


def packed(job: Path, manifest: str = "{}") -> str:
    """The folder of a packed data set."""
    folder = job / "a set"
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(manifest)
    return str(folder)


def leaves_with(job: Path, status: int) -> None:
    """Let srun leave so after training, and well from the look before it."""
    write_srun(job, f"[[ $* != *'hpctrain train'* ]] || exit {status}\n")


def requeue(status: int, *overrides: str) -> list[str]:
    """How the script asks to be started again."""
    asked = ["requeue", "small.yaml", *overrides, "--run-dir", "runs/small-30077", "--status", str(status)]
    return ["-m", "hpctrain", *asked]
