"""How train.sbatch ends: signals reach the ranks, their status is the job's, and a start that may go on is requeued."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.unit.job_scripts.conftest import (
    MPI_LIST,
    STAGED,
    TRAIN,
    VERSION,
    environment,
    leaves_with,
    packed,
    recorded,
    requeue,
    run,
    write_srun,
)
from tests.unit.slurm_doubles import Double


@pytest.mark.parametrize(("left_with", "status", "requeued"), [(2, 2, False), (1, 1, True), (137, 137, True)])
def test_how_staging_ends_decides_whether_the_job_is_started_again(
    job: Path, left_with: int, status: int, requeued: bool
) -> None:
    write_srun(job, f"touch $$.srun\n[[ $* != *stage_in* ]] || exit {left_with}\n")
    assert run(job, "small.yaml", HPCTRAIN_STAGE=packed(job), HPCTRAIN_SCRATCH="/disk").returncode == status
    assert len(list(job.glob("*.srun"))) == 2  # nothing is started after it
    last = [requeue(left_with, "--set", f"data.path={STAGED}")] if requeued else []
    assert recorded(job, "python").calls == [VERSION, *last]


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
