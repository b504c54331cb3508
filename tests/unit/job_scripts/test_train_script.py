"""train.sbatch: what it starts on the nodes, with which words and variables, and what it refuses before."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest

from tests.unit.job_scripts.conftest import GPUS, JOB, option, recorded, run
from tests.unit.slurm_doubles import Double


def test_ranks_are_given_the_whole_environment_of_the_job(job: Path) -> None:
    """Slurm leaves SLURM_EXPORT_ENV behind for a job submitted with --export=NAMES, and srun would go by it."""
    assert run(job, "small.yaml", SLURM_EXPORT_ENV="HOME").returncode == 0
    assert recorded(job, "srun").environ["SLURM_EXPORT_ENV"] == "ALL"


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
    placed = {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--distribution=block", "--cpus-per-task=2"}
    assert set(argv[:command]) == placed | {"--kill-on-bad-exit=1", "--wait=300", "--mpi=pmix"}
    words = "train small.yaml --set train.epochs=3 --set seed=2 --resume auto --run-dir runs/small-30077"
    assert " ".join(argv[command:]) == f"python -m hpctrain {words}"
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
