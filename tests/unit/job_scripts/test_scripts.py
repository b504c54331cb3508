"""The job scripts beside train.sbatch, and what all of them share."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.needs import needs_commands
from tests.unit.job_scripts.conftest import SLURM, TRAIN, VERSION, entered, of_slurm, packed, recorded, run
from tests.unit.slurm_doubles import Double


def test_scripts_are_clean() -> None:
    needs_commands("shellcheck")
    cluster = SLURM.parent / "tests/cluster"
    scripts = [path for folder in (SLURM, cluster) for path in folder.iterdir() if _is_shell(path)]
    assert TRAIN in scripts
    words = ["shellcheck", *(str(path.relative_to(SLURM.parent)) for path in scripts)]
    done = subprocess.run(words, cwd=SLURM.parent, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def _is_shell(path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith((b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh"))


def test_job_scripts_find_what_they_share_in_the_same_way() -> None:
    """Slurm copies a script to the node without its neighbours, so how they are found stands in each."""
    pattern = re.compile(r'^# sbatch copies .*?^source "\$home/slurm/job.sh"$', re.MULTILINE | re.DOTALL)
    scripts = [*SLURM.glob("*.sbatch"), SLURM / "prepare_imagenet.sh"]
    (found,) = {match[0] for path in scripts if (match := pattern.search(path.read_text()))}
    assert all(found in path.read_text() for path in scripts)


@pytest.mark.parametrize("way", ["HPCTRAIN_HOME", "SLURM_SUBMIT_DIR", "Command"])
def test_the_checkout_is_that_of_the_script_that_was_submitted(job: Path, way: str) -> None:
    checkout = job / "a check out"
    checkout.symlink_to(SLURM.parent)
    told = f"   JobName=x\n   Command={checkout}/slurm/train.sbatch small.yaml\n   WorkDir=/elsewhere\n"
    Double(job / "bin", "scontrol", stdout=told if way == "Command" else "127.0.0.1\n")
    where = {"SLURM_SUBMIT_DIR": "/elsewhere", way: str(checkout)}
    stage = {"HPCTRAIN_STAGE": packed(job), "HPCTRAIN_SCRATCH": "/disk"}
    done = run(job, "small.yaml", script=of_slurm(job, TRAIN), **where, **stage)
    assert done.returncode == 0, done.stderr
    assert ["show", "job", "30077"] in recorded(job, "scontrol").calls
    assert f"{checkout}/slurm/stage_in.sh" in recorded(job, "srun").calls[1]


@pytest.mark.parametrize("name", ["train.sbatch", "allreduce.sbatch", "install.sbatch", "prepare_imagenet.sh"])
def test_without_its_checkout_a_script_ends(job: Path, name: str) -> None:
    done = run(job, "small.yaml", script=of_slurm(job, SLURM / name), SLURM_SUBMIT_DIR=str(job))
    assert done.returncode == 2
    told = f"{job} is not hpctrain's checkout: submit this script there, or name it with HPCTRAIN_HOME"
    assert done.stderr == f"{name}: {told}\n"


def test_an_old_bash_is_told_so(job: Path) -> None:
    (job / "slurm").mkdir()
    shared = (SLURM / "job.sh").read_text()
    (job / "slurm/job.sh").write_text(shared.replace(">= 404", ">= 9904"))
    done = run(job, "small.yaml", HPCTRAIN_HOME=str(job))
    assert done.returncode == 2
    assert re.fullmatch(
        r"train.sbatch: bash \S+ on node \S+ is too old: put one from 4.4 on first on .*\n", done.stderr
    )


def test_resources_are_never_in_a_script() -> None:
    for path in SLURM.glob("*.sbatch"):
        directives = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
        allowed = ("--job-name", "--requeue", "--open-mode", "--signal")
        assert not [word for word in directives if not word.startswith(allowed)]


def test_allreduce_measures_over_the_whole_job(job: Path) -> None:
    done = run(job, "--max-size", "64 MiB", script=SLURM / "allreduce.sbatch", HPCTRAIN_ENGINE="mpi")
    assert done.returncode == 0, done.stderr
    (argv,) = recorded(job, "srun").calls
    assert "--ntasks=8" in argv and "--kill-on-bad-exit=1" in argv
    asked = ["--set", "comm.engine=mpi", "--max-size", "64 MiB", "--json", "runs/allreduce-30077.json"]
    assert argv[argv.index("python") :] == ["python", "-m", "hpctrain", "bench", "comm", *asked]


def test_imagenet_is_packed_from_its_three_archives_and_verified(job: Path) -> None:
    archives = job / "the archives"
    archives.mkdir()
    names = ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"]
    for name in names[:2]:
        (archives / name).touch()
    arguments = (str(archives), "packed set")
    missing = run(job, *arguments, script=SLURM / "prepare_imagenet.sh")
    assert missing.returncode == 2
    assert f"{archives}/{names[2]} cannot be read: get it from image-net.org" in missing.stderr
    (archives / names[2]).touch()
    assert run(job, *arguments, script=SLURM / "prepare_imagenet.sh").returncode == 0
    assert recorded(job, "python").calls == [
        VERSION,
        ["-m", "hpctrain", "data", "pack", "--ilsvrc", *(f"{archives}/{name}" for name in names), "packed set"],
        ["-m", "hpctrain", "data", "verify", "packed set", "--jobs", "2"],
    ]
    assert "two arguments are wanted" in run(job, script=SLURM / "prepare_imagenet.sh").stderr
    nowhere = run(job, str(archives), "/proc/none", script=SLURM / "prepare_imagenet.sh")
    assert nowhere.returncode == 2
    assert nowhere.stderr.endswith("the folder /proc/none cannot be made: name one that can be\n")


def test_imagenet_is_packed_in_the_container(job: Path) -> None:
    for name in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz", "my image.sif"):
        (job / name).touch()
    Double(job / "bin", "apptainer")
    done = run(job, str(job), "packed", script=SLURM / "prepare_imagenet.sh", HPCTRAIN_CONTAINER="my image.sif")
    assert done.returncode == 0, done.stderr
    pack, verify = recorded(job, "apptainer").calls
    words = entered(job, ["apptainer", *pack], job, job, job / "packed")
    assert " ".join(words[:5]) == "python -m hpctrain data pack"
    assert entered(job, ["apptainer", *verify], job, job, job / "packed")[4] == "verify"


@pytest.mark.parametrize(
    ("site", "commands", "extras", "more"),
    [
        ({}, (), "dali,build,digits,ilsvrc,mpi", []),
        ({"HPCTRAIN_GRES": "none"}, ("mpicxx",), "dali,build,digits,ilsvrc", ["--no-binary=mpi4py", "mpi4py"]),
        ({"HPCTRAIN_GRES": "gres"}, (), "dali,build,digits,ilsvrc,mpi,gpu", []),
    ],
)
def test_what_is_installed(
    job: Path, site: dict[str, str], commands: tuple[str, ...], extras: str, more: list[str]
) -> None:
    """What the first job and the packing of ImageNet need, too; the site's MPI where it has one."""
    for name in ("python3", *commands):
        Double(job / "bin", name)
    for name in ("bash", "env", "mktemp", "grep", "cp", "rm"):  # and no compiler of this machine's
        (job / "bin" / name).symlink_to(str(shutil.which(name)))
    (job / "venv/bin").mkdir(parents=True)
    (job / "venv/bin/activate").touch()
    checkout = str(SLURM.parent)
    settings = {"HPCTRAIN_HOME": checkout, "HPCTRAIN_VENV": str(job / "venv"), "PATH": str(job / "bin"), **site}
    done = run(job, script=SLURM / "install.sbatch", **settings)
    assert done.returncode == 0, done.stderr
    calls = recorded(job, "python").calls
    asked = [call[5:] for call in calls if call[1:3] == ["pip", "install"]]
    built = ["--gpu"] if "gpu" in extras else []
    assert asked == [
        ["setuptools<81", "wheel"],
        ["--no-build-isolation", "-e", f"{checkout}[{extras}]"],
        *([more] if more else []),
    ]
    assert calls[-2:] == [["-m", "hpctrain.build_horovod", *built], ["-m", "hpctrain", "doctor"]]
