"""The job scripts, run by bash with stand-ins for Slurm's commands: what they start, pass on, and refuse."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.needs import needs_commands
from tests.unit.slurm_doubles import Calls, Double

SLURM = Path(__file__).resolve().parents[2] / "slurm"
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


def of_slurm(job: Path, script: Path) -> Path:
    """The copy of a job script that Slurm starts on a node."""
    return Path(shutil.copy(script, job / "slurm_script"))


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


def test_ranks_are_given_the_whole_environment_of_the_job(job: Path) -> None:
    """Slurm leaves SLURM_EXPORT_ENV behind for a job submitted with --export=NAMES, and srun would go by it."""
    assert run(job, "small.yaml", SLURM_EXPORT_ENV="HOME").returncode == 0
    assert recorded(job, "srun").environ["SLURM_EXPORT_ENV"] == "ALL"


def test_resources_are_never_in_a_script() -> None:
    for path in SLURM.glob("*.sbatch"):
        directives = [line.split()[1] for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
        allowed = ("--job-name", "--requeue", "--open-mode", "--signal")
        assert not [word for word in directives if not word.startswith(allowed)]


def test_what_training_is_started_with(job: Path) -> None:
    done = run(job, "small.yaml", "train.epochs=3", "--set", "seed=2")
    assert done.returncode == 0, done.stderr
    srun = recorded(job, "srun")
    look, preflight, argv = srun.calls
    assert look[-4:] == ["-c", "[[ -r $1 ]] || exit 2", "look", "small.yaml"]
    asked = ["small.yaml", "--set", "train.epochs=3", "--set", "seed=2", "--run-dir", "runs/small-30077"]
    assert preflight[preflight.index("hpctrain") :] == ["hpctrain", "doctor", "--job", *asked]
    assert preflight[: preflight.index("bash")] == argv[: argv.index("python")]
    command = argv.index("python")
    assert set(argv[:command]) == {
        *("--kill-on-bad-exit=1", "--nodes=2", "--distribution=block", "--ntasks=8", "--ntasks-per-node=4"),
        *("--cpus-per-task=2", "--mpi=pmix"),
    }
    sets = ["--set", "train.epochs=3", "--set", "seed=2"]
    assert argv[command:] == [
        *(
            "python",
            "-m",
            "hpctrain",
            "train",
            "small.yaml",
            *sets,
            "--resume",
            "auto",
            "--run-dir",
            "runs/small-30077",
        ),
    ]
    environ = srun.environ
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("127.0.0.1", "15077")
    assert not (job / "runs/small-30077/nccl").exists()


def test_ranks_see_all_gpus_of_their_node(job: Path) -> None:
    assert run(job, "small.yaml", **GPUS).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert "--gpu-bind=none" in argv
    assert not [word for word in argv if word.startswith(("--gpus", "--gres"))]


def test_a_collective_that_hangs_on_gpus_leaves_its_history(job: Path) -> None:
    assert run(job, "small.yaml", **GPUS).returncode == 0
    environ = recorded(job, "srun").environ
    assert environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    assert environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == "runs/small-30077/nccl/rank-"
    assert (job / "runs/small-30077/nccl").is_dir()


def test_without_a_number_of_tasks_a_node_has_as_many_as_gpus(job: Path) -> None:
    assert run(job, "small.yaml", SLURM_NTASKS_PER_NODE="", SLURM_CPUS_PER_TASK="", **GPUS).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert (option(argv, "--ntasks"), option(argv, "--cpus-per-task")) == ("8", "2")


def test_tasks_may_be_given_as_a_sum(job: Path) -> None:
    assert run(job, "small.yaml", SLURM_NTASKS_PER_NODE="", SLURM_NTASKS="16", SLURM_CPUS_PER_TASK="").returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert (option(argv, "--ntasks"), option(argv, "--cpus-per-task")) == ("16", "1")


def test_the_site_file_reaches_ranks_and_script(job: Path) -> None:
    site = job / "my site.env"
    lines = ["HPCTRAIN_ENGINE=torch", "HPCTRAIN_MPI=none", "HPCTRAIN_RUNS='all runs'", "NCCL_DEBUG=WARN"]
    site.write_text("\n".join(lines) + "\n")
    done = run(job, "small.yaml", "seed=2", HPCTRAIN_SITE=str(site))
    assert done.returncode == 0, done.stderr
    srun = recorded(job, "srun")
    assert srun.environ["NCCL_DEBUG"] == "WARN"
    argv = srun.calls[-1]
    assert "--mpi=none" in argv
    assert argv[argv.index("small.yaml") + 1 :][:4] == ["--set", "comm.engine=torch", "--set", "seed=2"]
    assert argv[-1] == "all runs/small-30077"


def test_what_was_exported_for_the_job_comes_before_the_site_file(job: Path) -> None:
    site = job / "site.env"
    site.write_text("HPCTRAIN_RUNS=\nHPCTRAIN_ENGINE=torch\nHPCTRAIN_SCRATCH=/raid\n")
    exported = {"HPCTRAIN_RUNS": "my 'runs' $HOME", "HPCTRAIN_ENGINE": "mpi", "HPCTRAIN_SCRATCH": ""}
    assert run(job, "small.yaml", HPCTRAIN_SITE=str(site), **exported).returncode == 0
    srun = recorded(job, "srun")
    assert srun.calls[-1][-1] == "my 'runs' $HOME/small-30077"
    assert "comm.engine=mpi" in srun.calls[-1]
    assert {name: srun.environ[name] for name in exported} == {**exported, "HPCTRAIN_SCRATCH": "/raid"}


AWKWARD = "a 'b' \"c\" $(touch boo) `touch boo`\n$HOME \\ ; * #"


def test_awkward_words_arrive_as_they_are(job: Path) -> None:
    config = job / "a 'b' $(touch boo)\n.yaml"
    shutil.copy(job / "small.yaml", config)
    done = run(job, str(config), f"data.path={AWKWARD}", HPCTRAIN_RUNS="r $(touch boo)")
    assert done.returncode == 0, done.stderr
    argv = recorded(job, "srun").calls[-1]
    assert argv[argv.index("train") + 1 :] == [
        *(str(config), "--set", f"data.path={AWKWARD}", "--resume", "auto"),
        *("--run-dir", "r $(touch boo)/a 'b' $(touch boo)\n-30077"),
    ]
    assert not (job / "boo").exists()


@pytest.mark.parametrize(
    ("arguments", "more", "text"),
    [
        ([], {}, "no configuration given: sbatch"),
        (["none.yaml"], {}, "the configuration none.yaml cannot be read on node"),
        (["small.yaml"], {"SLURM_JOB_ID": ""}, "this is a job script: start it with sbatch or hpctrain submit"),
        (["small.yaml"], {"HPCTRAIN_SITE": "none.env"}, "the site file none.env cannot be read on node"),
        (["small.yaml"], {"HPCTRAIN_MPI": "pmi2"}, "HPCTRAIN_MPI is pmi2, with which each rank would start as a separ"),
        (["small.yaml"], {"HPCTRAIN_VENV": "/nowhere"}, "there is no environment in HPCTRAIN_VENV=/nowhere on node"),
        (["small.yaml"], {"PATH": "/usr/bin:/bin"}, "python on node"),
        (["small.yaml"], {"HPCTRAIN_CONTAINER": "no.sif"}, "the container no.sif cannot be read on node"),
        (
            ["small.yaml"],
            {"SLURM_HET_SIZE": "2"},
            "this is a heterogeneous job of 2 parts, but ranks are started in one",
        ),
        (
            ["small.yaml"],
            {"SLURM_NTASKS_PER_NODE": "", "SLURM_NTASKS": "5"},
            "5 ranks cannot be shared out evenly among 2 nodes: correct --ntasks, or give --ntasks-per-node",
        ),
        (
            ["small.yaml"],
            {"SLURM_NTASKS": "4"},
            "SLURM_NTASKS=4 and SLURM_NTASKS_PER_NODE=4 contradict each other on 2 nodes: give one of",
        ),
        (["small.yaml"], {"SLURM_GPUS_ON_NODE": "2"}, "tasks and GPUs differ, 4 and 2 a node: submit with --ntasks"),
        (
            ["small.yaml"],
            {"HPCTRAIN_GPUS_PER_NODE": "8"},
            "this job has no GPUs, but the nodes of this site have 8: add",
        ),
        (
            ["small.yaml"],
            {"SLURM_CPUS_PER_TASK": "3"},
            "4 ranks of 3 CPUs do not fit the 8 that this job has of",
        ),
        (
            ["small.yaml"],
            {"HPCTRAIN_STAGE": "/data"},
            "HPCTRAIN_STAGE is set, but not where to copy to: set HPCTRAIN_SC",
        ),
        (
            ["small.yaml"],
            {"HPCTRAIN_RUNS": "/proc/none"},
            "the run directory /proc/none/small-30077 cannot be made: set",
        ),
    ],
)
def test_what_cannot_work_ends_the_job_at_once(
    job: Path, arguments: list[str], more: dict[str, str], text: str
) -> None:
    done = run(job, *arguments, **more)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"train.sbatch: {text}")
    assert not recorded(job, "srun").calls


def entered(job: Path, argv: list[str], *folders: Path, gpus: bool = False) -> list[str]:
    """What is started in the container, which is entered with these folders."""
    binds = [word for folder in folders for word in ("--bind", str(folder))]
    words = ["apptainer", "exec", "--env", "PMIX_MCA_gds=hash", *(["--nv"] if gpus else []), *binds, "my image.sif"]
    first = argv.index("apptainer")
    assert argv[first : first + len(words)] == words
    return argv[first + len(words) :]


def test_a_container_is_entered_with_its_gpus_and_folders(job: Path) -> None:
    (job / "my image.sif").touch()
    configs, runs, disk = job / "recipes of mine", job / "all runs", job / "disk"
    configs.mkdir()
    config = shutil.copy(job / "small.yaml", configs)
    settings = {"HPCTRAIN_CONTAINER": "my image.sif", "HPCTRAIN_RUNS": str(runs)}
    assert run(job, str(config), **settings, **GPUS).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert entered(job, argv, job, runs, configs, gpus=True)[:4] == ["python", "-m", "hpctrain", "train"]
    stage = {"HPCTRAIN_STAGE": packed(job), "HPCTRAIN_SCRATCH": str(disk)}
    assert run(job, str(config), **settings, **stage).returncode == 0
    assert entered(job, recorded(job, "srun").calls[-1], job, runs, configs, disk)[0] == "python"
    assert run(job, script=SLURM / "allreduce.sbatch", **settings).returncode == 0
    assert entered(job, recorded(job, "srun").calls[-1], job, runs)[:4] == ["python", "-m", "hpctrain", "bench"]


def test_a_container_sees_a_folder_by_the_name_it_is_told_by_too(job: Path) -> None:
    (job / "my image.sif").touch()
    (job / "real").mkdir()
    (job / "runs").symlink_to(job / "real")
    assert run(job, "small.yaml", HPCTRAIN_CONTAINER="my image.sif", HPCTRAIN_RUNS=str(job / "runs")).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert argv[argv.index(str(job / "real")) :][:3] == [str(job / "real"), "--bind", f"{job}/real:{job}/runs"]


def test_modules_are_loaded_where_the_shell_does_not_know_them_yet(job: Path) -> None:
    (job / "modules/init").mkdir(parents=True)
    (job / "modules/init/bash").write_text('false\nmodule() { [[ $2 != none ]] && export LOADED="$*$NOWHERE"; }\n')
    modules = {"MODULESHOME": str(job / "modules"), "HPCTRAIN_MODULES": "gcc cuda/13"}
    done = run(job, "small.yaml", **modules)
    assert done.returncode == 0, done.stderr
    assert recorded(job, "srun").environ["LOADED"] == "load gcc cuda/13"
    done = run(job, "small.yaml", **modules | {"HPCTRAIN_MODULES": "none"})
    assert done.returncode == 2
    assert done.stderr == "train.sbatch: module load none failed: correct HPCTRAIN_MODULES\n"


def test_a_node_without_modules_is_told_so(job: Path) -> None:
    if any(Path("/etc/profile.d", name).exists() for name in ("lmod.sh", "modules.sh")):
        pytest.skip("this machine has modules")
    done = run(job, "small.yaml", HPCTRAIN_MODULES="gcc")
    assert done.returncode == 2
    assert "has no `module` command for HPCTRAIN_MODULES=gcc: export MODULESHOME, the folder that has" in done.stderr


def test_a_site_file_that_asks_for_what_is_not_set_is_named(job: Path) -> None:
    site = job / "site.env"
    site.write_text("HPCTRAIN_MPI=pmix\nHPCTRAIN_SCRATCH=$SITE_DISK/data\n")
    done = run(job, "small.yaml", HPCTRAIN_SITE=str(site))
    assert done.returncode == 2
    assert f"the site file {site} does not work on node" in done.stderr
    assert "(line 2: SITE_DISK: unbound variable): correct that line, or export what it uses" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert run(job, "small.yaml", HPCTRAIN_SITE=str(site), SITE_DISK="/disk").returncode == 0


#: what the data set of ``packed`` is copied to, on a node whose disk is /disk
STAGED = f"/disk/a set-{hashlib.sha256(b'{}').hexdigest()[:12]}"


def packed(job: Path, manifest: str = "{}") -> str:
    """The folder of a packed data set."""
    folder = job / "a set"
    folder.mkdir(exist_ok=True)
    (folder / "dataset.json").write_text(manifest)
    return str(folder)


@pytest.mark.parametrize("own", [False, True])
def test_what_is_staged_is_what_is_trained_on(job: Path, own: bool) -> None:
    source = packed(job)
    overrides = [*([f"data.path={source}/"] if own else []), "seed=2"]
    assert run(job, "small.yaml", *overrides, HPCTRAIN_STAGE=source, HPCTRAIN_SCRATCH="/disk").returncode == 0
    staging, preflight, training = recorded(job, "srun").calls[1:]
    assert staging[-4:-1] == ["bash", str(SLURM / "stage_in.sh"), source]
    assert staging[-1] == STAGED
    assert "--ntasks=2" in staging and "--cpus-per-task=8" in staging
    sets = [word for name in [*overrides, f"data.path={staging[-1]}"] for word in ("--set", name)]
    for argv in (preflight, training):
        assert argv[argv.index("small.yaml") + 1 :][: len(sets)] == sets


def test_each_version_of_a_data_set_has_a_folder_of_its_own(job: Path) -> None:
    def staged(manifest: str) -> str:
        srun = Double(job / "bin", "srun", first=MPI_LIST)
        stage = {"HPCTRAIN_STAGE": packed(job, manifest), "HPCTRAIN_SCRATCH": "/disk"}
        assert run(job, "small.yaml", **stage).returncode == 0
        return next(call[-1] for call in reversed(srun.calls) if call[-3].endswith("stage_in.sh"))

    first, other, again = staged("1"), staged("2"), staged("1")
    assert first == again != other


def test_another_data_set_than_the_staged_one_is_refused(job: Path) -> None:
    done = run(job, "small.yaml", "data.path=/data/other", HPCTRAIN_STAGE=packed(job), HPCTRAIN_SCRATCH="/disk")
    assert done.returncode == 2
    told = f"the data set that is staged, HPCTRAIN_STAGE={packed(job)}: leave one of the two out"
    assert done.stderr == f"train.sbatch: data.path=/data/other is not {told}\n"
    assert not recorded(job, "srun").calls


def test_what_is_no_packed_data_set_is_not_staged(job: Path) -> None:
    done = run(job, "small.yaml", HPCTRAIN_STAGE="/no set", HPCTRAIN_SCRATCH="/disk")
    assert done.returncode == 2
    assert done.stderr.startswith("train.sbatch: /no set/dataset.json cannot be read on node ")
    assert done.stderr.endswith("let HPCTRAIN_STAGE name a folder that `hpctrain data pack` has finished\n")


def test_a_pmix_that_slurm_has_not_is_told_before_anything_starts(job: Path) -> None:
    srun = Double(job / "bin", "srun", stdout="MPI plugin types are...\n\tnone\n\tpmi2\n")
    for asked in ("", "pmix_v4"):
        done = run(job, "small.yaml", HPCTRAIN_MPI=asked)
        assert done.returncode == 2
        assert done.stderr == (
            f"train.sbatch: this Slurm has no {asked or 'pmix'} for ranks to find each other by (srun --mpi=list): set "
            "HPCTRAIN_MPI to the pmix that it has, or to none together with HPCTRAIN_ENGINE=torch\n"
        )
    assert srun.calls == [["--mpi=list"]] * 2


@pytest.mark.parametrize(("left_with", "status", "requeued"), [(2, 2, False), (1, 1, True), (137, 137, True)])
def test_how_staging_ends_decides_whether_the_job_is_started_again(
    job: Path, left_with: int, status: int, requeued: bool
) -> None:
    write_srun(job, f"touch $$.srun\n[[ $* != *stage_in* ]] || exit {left_with}\n")
    assert run(job, "small.yaml", HPCTRAIN_STAGE=packed(job), HPCTRAIN_SCRATCH="/disk").returncode == status
    assert len(list(job.glob("*.srun"))) == 2  # nothing is started after it
    last = [requeue(left_with, "--set", f"data.path={STAGED}")] if requeued else []
    assert recorded(job, "python").calls == [VERSION, *last]


def leaves_with(job: Path, status: int) -> None:
    """Let srun leave so after training, and well from the look before it."""
    write_srun(job, f"[[ $* != *'hpctrain train'* ]] || exit {status}\n")


def requeue(status: int, *overrides: str) -> list[str]:
    """How the script asks to be started again."""
    asked = ["requeue", "small.yaml", *overrides, "--run-dir", "runs/small-30077", "--status", str(status)]
    return ["-m", "hpctrain", *asked]


def test_a_node_that_is_gone_before_the_first_step_is_looked_for(job: Path) -> None:
    Double(job / "bin", "srun", status=1, first=MPI_LIST)
    assert run(job, "small.yaml").returncode == 1
    assert ["doctor" in call for call in recorded(job, "srun").calls] == [False, True]
    assert recorded(job, "python").calls == [VERSION, requeue(1)]


def test_what_the_preflight_finds_ends_the_job(job: Path) -> None:
    write_srun(job, "touch $$.srun\n[[ $* != *doctor* ]] || exit 2\n")
    assert run(job, "small.yaml").returncode == 2
    assert len(list(job.glob("*.srun"))) == 2


def test_a_configuration_that_another_node_lacks_ends_the_job(job: Path) -> None:
    Double(job / "bin", "srun", status=2, first=MPI_LIST)
    done = run(job, "small.yaml")
    assert done.returncode == 2
    told = "the configuration small.yaml cannot be read on all nodes: put it on a file system that they share"
    assert done.stderr == f"train.sbatch: {told}\n"
    assert len(recorded(job, "srun").calls) == 1


def test_a_port_that_is_taken_is_left_alone(job: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        Double(job / "bin", "scontrol", stdout="localhost\nn2\n")
        done = run(job, "small.yaml", MASTER_PORT=str(port))
        assert done.returncode == 2
        told = f"port {port} of localhost, where the ranks were to meet, is taken by another program: export another"
        assert done.stderr == f"train.sbatch: {told} MASTER_PORT, or none\n"
        first = 15000 + int(JOB["SLURM_JOB_ID"]) % 15000
        with socket.create_server(("127.0.0.1", first)):
            assert run(job, "small.yaml").returncode == 0
    assert recorded(job, "srun").environ["MASTER_PORT"] == str(first + 1)


def test_a_rank_that_srun_ends_does_not_decide_over_the_status(job: Path) -> None:
    """srun leaves with the greatest status of its tasks, and that of one ended by SIGTERM is 143."""
    write_srun(
        job,
        "[[ $* == *doctor* ]] || exit 0\nuntil [[ $1 == bash ]]; do shift; done\n"
        '"$@" & rank=$!\nuntil [[ -e begun ]]; do sleep 0.05; done\nkill -TERM $rank\nwait $rank\n'
        "status=$?\nexit $((status > 2 ? status : 2))\n",
    )
    (job / "bin/python").write_text(
        "#!/bin/bash\n[[ $* == *--version ]] && exit\ntouch begun\nexec sleep 5 &>/dev/null\n"
    )
    assert run(job, "small.yaml").returncode == 2


@pytest.mark.parametrize("left_with", [0, 143])
def test_a_warning_during_the_preflight_leads_to_a_requeue(job: Path, left_with: int) -> None:
    warned = f"touch $$.srun\ntrap '' USR1\nkill -USR1 $PPID\nexit {left_with}\n"
    write_srun(job, f"[[ $* == *doctor* ]] || exit 0\n{warned}")
    assert run(job, "small.yaml").returncode == 75
    assert recorded(job, "python").calls[-1] == requeue(75)
    assert len(list(job.glob("*.srun"))) == 1


@pytest.mark.parametrize(("left_with", "status"), [(138, 75), (143, 75), (1, 75), (2, 2), (0, 0)])
def test_a_warning_that_ranks_do_not_survive_asks_for_another_start(job: Path, left_with: int, status: int) -> None:
    """It may come while they start python, before anything listens to signals."""
    write_srun(
        job,
        "[[ $* == *'hpctrain train'* ]] || exit 0\n"
        f"trap 'exit {left_with}' USR1\nkill -USR1 $PPID\nfor ((i = 0; i < 600; i++)); do sleep 0.1; done\n",
    )
    assert run(job, "small.yaml").returncode == status
    assert (requeue(75) in recorded(job, "python").calls) == (status == 75)


def test_a_warning_before_training_begins_is_not_lost(job: Path) -> None:
    """bash runs a trap between two commands, here before it knows the step that the warning is for."""
    text = TRAIN.read_text()
    assert "    srun_pid=$!\n" in text
    script = job / "train.sbatch"
    script.write_text(text.replace("    srun_pid=$!\n", "    kill -USR1 $$\n    srun_pid=$!\n"))
    write_srun(
        job,
        "[[ $* == *doctor* ]] || exit 0\ntrap 'touch warned; exit 75' USR1\ntouch listens\n"
        "for ((i = 0; i < 600; i++)); do /bin/sleep 0.1; done\n",
    )
    (job / "bin/sleep").write_text("#!/bin/bash\nuntil [[ -e listens ]]; do /bin/sleep 0.05; done\n")
    (job / "bin/sleep").chmod(0o755)
    assert run(job, "small.yaml", script=script).returncode == 75
    assert recorded(job, "python").calls == [VERSION, requeue(75)]


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_the_status_of_the_ranks_is_that_of_the_job(job: Path, status: int) -> None:
    leaves_with(job, status)
    assert run(job, "small.yaml").returncode == status
    last = {0: [["-m", "hpctrain", "account", "runs/small-30077"]], 2: []}.get(status, [requeue(status)])
    assert recorded(job, "python").calls == [VERSION, *last]


def test_a_preempted_job_is_requeued(job: Path) -> None:
    leaves_with(job, 75)
    assert run(job, "small.yaml", "seed=2").returncode == 75
    assert recorded(job, "python").calls == [VERSION, requeue(75, "--set", "seed=2")]


def test_slurms_end_of_a_requeued_job_reaches_no_rank_of_its_next_start(job: Path) -> None:
    leaves_with(job, 75)
    (job / "bin/python").write_text("#!/bin/bash\n[[ $* != *requeue* ]] || kill -TERM $PPID\n")
    assert run(job, "small.yaml").returncode == 75
    assert not recorded(job, "scancel").calls


def test_an_array_keeps_its_run_directory_and_stops_when_it_has_finished(job: Path) -> None:
    done = run(job, "small.yaml", SLURM_ARRAY_JOB_ID="30070")
    assert done.returncode == 0
    assert recorded(job, "srun").calls[-1][-1] == "runs/small-30070"
    assert recorded(job, "scancel").calls == [["--state=PENDING", "30070"]]


def test_an_array_stops_at_a_mistake_and_goes_on_after_a_checkpoint(job: Path) -> None:
    assert run(job, "none.yaml", SLURM_ARRAY_JOB_ID="30070").returncode == 2
    assert recorded(job, "scancel").calls == [["--state=PENDING", "30070"]]
    leaves_with(job, 75)
    assert run(job, "small.yaml", SLURM_ARRAY_JOB_ID="30070").returncode == 75
    assert len(recorded(job, "scancel").calls) == 1


def test_a_run_directory_can_be_gone_on_in(job: Path) -> None:
    assert run(job, "small.yaml", HPCTRAIN_RUN_DIR="runs/small-1").returncode == 0
    assert recorded(job, "srun").calls[-1][-1] == "runs/small-1"


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_signals_are_passed_on_and_waited_for(job: Path, name: str) -> None:
    """A rank needs its time after the signal: it writes a checkpoint and leaves with 75."""
    write_srun(
        job,
        "[[ $* == *'hpctrain train'* ]] || exit 0\n"
        f"trap 'sleep 0.5; echo {name} came; exit 75' {name}\necho $$ > pid\ntouch ready\n"
        "for ((i = 0; i < 600; i++)); do sleep 0.1; done\n",
    )
    (job / "bin/scancel").write_text('#!/bin/bash\n[[ $* == "--signal=TERM 30077" ]] && kill -s TERM "$(<pid)"\n')
    process = subprocess.Popen(
        ["bash", str(TRAIN), "small.yaml"], cwd=job, env=environment(job, {}), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (job / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.Signals[f"SIG{name}"])
    out, _ = process.communicate(timeout=60)
    assert f"{name} came" in out
    assert process.returncode == 75
    assert recorded(job, "python").calls == [VERSION, requeue(75)]


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
    assert entered(job, ["apptainer", *pack], job, job, job / "packed")[:5] == [
        "python",
        "-m",
        "hpctrain",
        "data",
        "pack",
    ]
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
