"""The job scripts, run by bash with stand-ins for Slurm's commands: what they start, pass on, and refuse."""

from __future__ import annotations

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
}
VERSION = ["-m", "hpctrain", "--version"]
GPUS = {"SLURM_GPUS_ON_NODE": "4"}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a configuration, and Slurm's commands in its bin."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "small.yaml").write_text("model: {name: dense}\n")
    Double(tmp_path / "bin", "srun")
    Double(tmp_path / "bin", "scontrol", stdout="n1\nn2\n")
    Double(tmp_path / "bin", "scancel")
    Double(tmp_path / "bin", "python")
    return tmp_path


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
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout


def _is_shell(path: Path) -> bool:
    return path.is_file() and path.read_bytes().startswith((b"#!/usr/bin/env bash", b"#!/bin/bash", b"#!/bin/sh"))


@pytest.mark.parametrize("part", ["site", "environment", "ranks"])
def test_what_job_scripts_share_is_the_same_in_each(part: str) -> None:
    """Slurm copies a script to the node without its neighbours, so what they share stands in each."""
    pattern = re.compile(rf"^# ---- begin {part}\b.*?^# ---- end {part} ----$", re.MULTILINE | re.DOTALL)
    scripts = [*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh")]
    shared = {path.name: match[0] for path in scripts if (match := pattern.search(path.read_text()))}
    assert "train.sbatch" in shared and len(shared) > 1
    assert set(shared.values()) == {shared["train.sbatch"]}


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
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("n1", "15077")
    assert environ["TORCH_NCCL_TRACE_BUFFER_SIZE"] == "2000"
    assert environ["TORCH_NCCL_DEBUG_INFO_TEMP_FILE"] == "runs/small-30077/nccl/rank-"
    assert (job / "runs/small-30077/nccl").is_dir()


def test_ranks_see_all_gpus_of_their_node(job: Path) -> None:
    assert run(job, "small.yaml", **GPUS).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    assert "--gpu-bind=none" in argv
    assert not [word for word in argv if word.startswith(("--gpus", "--gres"))]


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
        (["small.yaml"], {"HPCTRAIN_MPI": "pmi2"}, "HPCTRAIN_MPI is pmi2, with which every rank would be a world of"),
        (["small.yaml"], {"HPCTRAIN_MODULES": "no such"}, "module load no such failed: correct HPCTRAIN_MODULES"),
        (["small.yaml"], {"HPCTRAIN_VENV": "/nowhere"}, "there is no environment in HPCTRAIN_VENV=/nowhere on node"),
        (["small.yaml"], {"PATH": "/usr/bin:/bin"}, "python on node"),
        (["small.yaml"], {"HPCTRAIN_CONTAINER": "no.sif"}, "the container no.sif cannot be read on node"),
        (["small.yaml"], {"SLURM_GPUS_ON_NODE": "2"}, "tasks and GPUs differ, 4 and 2 a node: submit with --ntasks"),
        (
            ["small.yaml"],
            {"HPCTRAIN_GPUS_PER_NODE": "8"},
            "this job has no GPUs, but the nodes of this site have 8: add",
        ),
        (
            ["small.yaml"],
            {"SLURM_CPUS_PER_TASK": "3"},
            "4 ranks of 3 cores do not fit the 8 cores that this job has of",
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


def test_a_container_is_entered_with_its_gpus(job: Path) -> None:
    (job / "my image.sif").touch()
    assert run(job, "small.yaml", HPCTRAIN_CONTAINER="my image.sif", **GPUS).returncode == 0
    argv = recorded(job, "srun").calls[-1]
    inside = argv[argv.index("apptainer") :]
    assert inside[:7] == ["apptainer", "exec", "--nv", "--bind", str(job), "my image.sif", "python"]


def leaves_with(job: Path, status: int) -> None:
    """Let srun leave so after training, and well from the look before it."""
    (job / "bin/srun").write_text(f"#!/bin/bash\n[[ $* != *'hpctrain train'* ]] || exit {status}\n")


def requeue(status: int, *overrides: str) -> list[str]:
    """How the script asks to be started again."""
    asked = ["requeue", "small.yaml", *overrides, "--run-dir", "runs/small-30077", "--status", str(status)]
    return ["-m", "hpctrain", *asked]


def test_a_node_that_is_gone_before_the_first_step_is_looked_for(job: Path) -> None:
    Double(job / "bin", "srun", status=1)
    assert run(job, "small.yaml").returncode == 1
    assert ["doctor" in call for call in recorded(job, "srun").calls] == [False, True]
    assert recorded(job, "python").calls == [VERSION, requeue(1)]


def test_what_the_preflight_finds_ends_the_job(job: Path) -> None:
    (job / "bin/srun").write_text("#!/bin/bash\ntouch $$.srun\n[[ $* != *doctor* ]] || exit 2\n")
    assert run(job, "small.yaml").returncode == 2
    assert len(list(job.glob("*.srun"))) == 2


def test_a_configuration_that_another_node_lacks_ends_the_job(job: Path) -> None:
    Double(job / "bin", "srun", status=2)
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
    (job / "bin/srun").write_text(
        "#!/bin/bash\n[[ $* == *doctor* ]] || exit 0\nuntil [[ $1 == bash ]]; do shift; done\n"
        '"$@" & rank=$!\nuntil [[ -e begun ]]; do sleep 0.05; done\nkill -TERM $rank\nwait $rank\n'
        "status=$?\nexit $((status > 2 ? status : 2))\n"
    )
    (job / "bin/python").write_text(
        "#!/bin/bash\n[[ $* == *--version ]] && exit\ntouch begun\nexec sleep 5 &>/dev/null\n"
    )
    assert run(job, "small.yaml").returncode == 2


def test_a_warning_during_the_preflight_leads_to_a_requeue(job: Path) -> None:
    warned = "touch $$.srun\nkill -USR1 $PPID\nexit 143\n"
    (job / "bin/srun").write_text(f"#!/bin/bash\n[[ $* == *doctor* ]] || exit 0\n{warned}")
    assert run(job, "small.yaml").returncode == 75
    assert recorded(job, "python").calls[-1] == requeue(75)
    assert len(list(job.glob("*.srun"))) == 1


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


def test_a_run_directory_can_be_gone_on_in(job: Path) -> None:
    assert run(job, "small.yaml", HPCTRAIN_RUN_DIR="runs/small-1").returncode == 0
    assert recorded(job, "srun").calls[-1][-1] == "runs/small-1"


@pytest.mark.parametrize("name", ["USR1", "USR2", "TERM"])
def test_signals_are_passed_on_and_waited_for(job: Path, name: str) -> None:
    """A rank needs its time after the signal: it writes a checkpoint and leaves with 75."""
    srun = job / "bin/srun"
    srun.write_text(
        "#!/bin/bash\n[[ $* == *'hpctrain train'* ]] || exit 0\n"
        f"trap 'sleep 0.5; echo {name} came; exit 75' {name}\necho $$ > pid\ntouch ready\n"
        "for ((i = 0; i < 600; i++)); do sleep 0.1; done\n"
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


def test_installing_wants_the_checkout(job: Path) -> None:
    done = run(job, script=SLURM / "install.sbatch")
    assert done.returncode == 2
    assert done.stderr.endswith("is not hpctrain's checkout: submit this script there, or name it with HPCTRAIN_HOME\n")


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
