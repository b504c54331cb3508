"""hpctrain requeue: when Slurm is asked to start a job again, and what is said when it is not."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.config.launch import LaunchConfig
from hpctrain.errors import UserError
from hpctrain.launch.requeue import NotRequeued, requeue
from tests.unit.slurm_doubles import Double


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "77", **more}


def after_preemption(environ: dict[str, str], config: LaunchConfig | None = None) -> str:
    return requeue(config or LaunchConfig(), environ, Path("not looked at"), 75)


def not_requeued(folder: Path, config: LaunchConfig | None = None, **more: str) -> str:
    with pytest.raises(NotRequeued) as caught:
        after_preemption(environment(folder, **more), config)
    assert caught.value.exit_code == 75
    return str(caught.value)


@pytest.mark.parametrize(("restarts", "number"), [({}, 1), ({"SLURM_RESTART_COUNT": "3"}, 4)])
def test_a_job_is_started_again(tmp_path: Path, restarts: dict[str, str], number: int) -> None:
    scontrol = Double(tmp_path, "scontrol", stdout=f"JobId=77 Requeue=1 Restarts={number - 1}\n")
    told = after_preemption(environment(tmp_path, **restarts))
    assert told == f"job 77 is requeued ({number} of at most 10)"
    assert scontrol.calls == [["show", "job", "--oneliner", "77"], ["requeue", "77"]]


def test_a_start_that_slurm_ends_at_once_tells_what_it_has_done(tmp_path: Path) -> None:
    Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=1\n", then="[[ $1 != requeue ]] || kill -s TERM $PPID")
    config = tmp_path / "small.yaml"
    config.write_text("model: {name: dense}\n")
    words = [sys.executable, "-m", "hpctrain", "requeue", str(config), "--run-dir", "run", "--status", "75"]
    env = {**environment(tmp_path), "PYTHONPATH": os.getcwd()}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "hpctrain: job 77 is requeued (1 of at most 10)\n"), done.stderr


def test_a_start_that_is_over_does_not_end_the_next_one(tmp_path: Path) -> None:
    """Its script was on a node that was cut off, and is back."""
    scontrol = Double(tmp_path, "scontrol", stdout="JobId=77 JobState=RUNNING Requeue=1 Restarts=2\n")
    told = not_requeued(tmp_path, SLURM_RESTART_COUNT="1")
    assert told == "Slurm has started job 77 again already: this start of it, number 2, is over"
    assert len(scontrol.calls) == 1


def test_it_is_not_started_again_for_ever(tmp_path: Path) -> None:
    scontrol = Double(tmp_path, "scontrol", stdout="Requeue=1")
    told = not_requeued(tmp_path, LaunchConfig(max_requeues=2), SLURM_RESTART_COUNT="2")
    assert told.startswith("job 77 has been started again 2 times already (launch.max_requeues=2): find")
    assert not scontrol.calls


def test_a_site_may_forbid_it(tmp_path: Path) -> None:
    scontrol = Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=0 Restarts=0\n")
    assert not_requeued(tmp_path).startswith("Slurm may not start job 77 again (--no-requeue, or the site's JobRequeue")
    assert len(scontrol.calls) == 1


@pytest.mark.parametrize("state", ["COMPLETING", "CANCELLED", "PREEMPTED"])
@pytest.mark.parametrize(
    ("run", "limit"), [("00:04:59", "UNLIMITED"), ("00:04:59", "00:05:00"), ("00:00:00", "1-00:00:00")]
)
def test_what_its_owner_or_slurm_has_ended_is_left_so(tmp_path: Path, state: str, run: str, limit: str) -> None:
    """A cancelled job's ranks write their checkpoint and leave with 75 as well, and Slurm would start it again."""
    facts = f"JobId=77 JobState={state} Reason=None Requeue=1 RunTime={run} TimeLimit={limit}\n"
    scontrol = Double(tmp_path, "scontrol", stdout=facts)
    assert not_requeued(tmp_path).startswith(f"job 77 was cancelled or preempted ({state}) and is not started again")
    assert len(scontrol.calls) == 1


def test_a_job_that_ran_to_its_time_limit_is_started_again(tmp_path: Path) -> None:
    facts = "JobId=77 JobState=COMPLETING Requeue=1 RunTime=1-00:00:02 TimeLimit=1-00:00:00\n"
    scontrol = Double(tmp_path, "scontrol", stdout=facts)
    assert after_preemption(environment(tmp_path)).startswith("job 77 is requeued")
    assert scontrol.calls[-1] == ["requeue", "77"]


def test_slurm_may_refuse(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[[ $1 == show ]] && exit\necho "Job is completing" >&2\nexit 1\n')
    (tmp_path / "scontrol").chmod(0o755)
    assert not_requeued(tmp_path).startswith("Slurm does not start job 77 again (Job is completing)")


AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def away_for(folder: Path, calls: int, words: str = AWAY) -> None:
    """A Slurm whose controller is away for so many ``calls`` of scontrol."""
    script = f"""#!/bin/bash
echo "$1" >>{folder}/asked
if (($(wc -l <{folder}/asked) <= {calls})); then
    echo {words!r} >&2
    exit 1
fi
echo JobId=77 Requeue=1
"""
    (folder / "scontrol").write_text(script)
    (folder / "scontrol").chmod(0o755)


@pytest.mark.parametrize(
    "words", [AWAY, "Slurm backup controller in standby mode", "Zero Bytes were transmitted or received"]
)
def test_a_controller_that_is_away_is_asked_until_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: str
) -> None:
    monkeypatch.setattr(f"{requeue.__module__}._AGAIN_S", 0.01)
    away_for(tmp_path, 3, words)
    assert after_preemption(environment(tmp_path)) == "job 77 is requeued (1 of at most 10)"
    assert (tmp_path / "asked").read_text().split() == ["show"] * 4 + ["requeue"]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("hpctrain: Slurm's controller does not answer (")
    assert said.endswith("; it is asked again for 5 minutes")


def test_a_controller_that_stays_away_does_not_hide_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{requeue.__module__}._PATIENCE_S", 0.0)
    away_for(tmp_path, 9)
    assert not_requeued(tmp_path).startswith(
        "Slurm does not start job 77 again (Slurm's controller does not answer (slurm_load_jobs error: Unable to"
    )


@pytest.mark.parametrize(
    ("task", "told"), [("2", "task 2 of array 70 ends here, the next one goes on"), ("9", "was the last")]
)
def test_an_arrays_next_task_goes_on(tmp_path: Path, task: str, told: str) -> None:
    scontrol = Double(tmp_path, "scontrol")
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_MAX": "9"}
    assert told in not_requeued(tmp_path, **array)
    assert not scontrol.calls


def test_outside_of_a_job_there_is_nothing_to_requeue(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("there is no job to requeue (SLURM_JOB_ID is not set)")) as caught:
        after_preemption({})
    assert caught.value.exit_code == 2


ALONE = [
    "--ntasks-per-node=1",
    "--cpus-per-task=1",
    "--mem=0",
    "--overlap",
    "--mpi=none",
    "--kill-on-bad-exit=1",
    "true",
]


def begin(launch: int, step: int, **slurm: str) -> dict[str, object]:
    """The line of a launch by the first start of job 77, unless told."""
    facts = {"world_size": 4, "train_samples": 100, "time": "2020-01-02T00:00:00+00:00"}
    return {"launch": launch, "event": "begin", "step": step, **facts, "slurm_job_id": "77", **slurm}


def run_of(folder: Path, *lines: dict[str, object], found: int = 0, saved: int = 0) -> Path:
    """A run directory with these lines in its list of launches; its checkpoints are of step ``found``, which was there
    when the last of them began, and of step ``saved``, which was not."""
    run = folder / "run"
    (run / "checkpoints/.step-000099.partial").mkdir(parents=True)
    for step in filter(None, (found, saved)):
        (run / f"checkpoints/step-{step:06d}").mkdir()
    launches = run / "launches.jsonl"
    launches.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # By the clock of a file system that is years behind.
    os.utime(launches, (1e9, 1e9))
    if found:
        os.utime(run / f"checkpoints/step-{found:06d}", (1e9 - 60, 1e9 - 60))
    if saved:
        os.utime(run / f"checkpoints/step-{saved:06d}", (1e9 + 60, 1e9 + 60))
    return run


def after_fault(folder: Path, run: Path, config: LaunchConfig | None = None, **more: str) -> str:
    environ = environment(folder, SLURM_JOB_NUM_NODES="4", **more)
    return requeue(config or LaunchConfig(), environ, run, 137)


FINISHED = {"launch": 1, "event": "end", "step": 20, "preempted": False, "write_s": 0.5}
PREEMPTED_AT_10 = {"launch": 0, "event": "end", "step": 10, "preempted": True, "write_s": 0.5}


@pytest.mark.parametrize(
    ("lines", "found", "saved"),
    [
        pytest.param([begin(0, 0)], 0, 0, id="for the first time"),
        pytest.param([begin(0, 0), begin(1, 10)], 10, 0, id="for the first time from a checkpoint"),
        pytest.param([begin(0, 10), begin(1, 10)], 10, 15, id="with a new checkpoint"),
        pytest.param([begin(0, 10), begin(1, 10)], 0, 20, id="with a new one in the place of a spoilt one"),
        pytest.param([begin(0, 10), PREEMPTED_AT_10, begin(1, 10)], 10, 0, id="after a preemption"),
        pytest.param([begin(0, 10), begin(1, 10), FINISHED], 10, 0, id="after the end of the training"),
    ],
)
def test_after_a_fault_a_job_is_started_again(
    tmp_path: Path, lines: list[dict[str, object]], found: int, saved: int
) -> None:
    Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=1\n")
    srun = Double(tmp_path, "srun")
    told = after_fault(tmp_path, run_of(tmp_path, *lines, found=found, saved=saved))
    assert told == "job 77 is requeued (1 of at most 10), after a fault (exit status 137)"
    assert not srun.calls


TWICE = "for the second time since step 10, before a checkpoint"


@pytest.mark.parametrize(
    ("lines", "found", "where"),
    [
        pytest.param([begin(0, 10), begin(1, 10)], 10, TWICE, id="twice"),
        pytest.param([begin(0, 10), begin(1, 10)], 20, TWICE, id="twice, having passed over a spoilt checkpoint"),
        pytest.param([], 0, "before it began to train", id="not begun"),
        pytest.param([begin(0, 0, slurm_job_id="76")], 0, "before it began to train", id="begun by another job"),
    ],
)
def test_what_promises_nothing_ends_with_its_status(
    tmp_path: Path, lines: list[dict[str, object]], found: int, where: str
) -> None:
    scontrol, srun = Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=1\n"), Double(tmp_path, "srun")
    with pytest.raises(NotRequeued) as caught:
        after_fault(tmp_path, run_of(tmp_path, *lines, found=found))
    assert caught.value.exit_code == 137
    assert str(caught.value) == (
        f"job 77 is not started again: it failed (exit status 137) {where}, and its nodes answer; "
        "find the fault above, then submit it again with HPCTRAIN_RUN_DIR set to its run directory"
    )
    assert srun.calls == [["--nodes=4", "--ntasks=4", *ALONE]]
    assert scontrol.calls == [["show", "job", "--oneliner", "77"]]


def test_a_restart_that_fails_before_it_trains_is_repeated_once(tmp_path: Path) -> None:
    """The fault may have been of the moment. A second in a row, or a checkpoint that nobody can read, is none."""
    run = run_of(tmp_path, begin(0, 0), begin(1, 5, slurm_restart_count="1"), saved=5)
    Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=1\n")
    Double(tmp_path, "srun")
    told = after_fault(tmp_path, run, SLURM_RESTART_COUNT="2")
    assert told == "job 77 is requeued (3 of at most 10), after a fault (exit status 137)"
    with pytest.raises(NotRequeued, match="before it began to train, as the start before it, and its nodes answer"):
        after_fault(tmp_path, run, SLURM_RESTART_COUNT="3")


def test_a_start_that_is_over_is_told_so_after_a_fault_too(tmp_path: Path) -> None:
    run = run_of(tmp_path, begin(0, 0), begin(1, 5, slurm_restart_count="2"), saved=5)
    Double(tmp_path, "scontrol", stdout="JobId=77 JobState=RUNNING Requeue=1 Restarts=2\n")
    with pytest.raises(
        NotRequeued, match="Slurm has started job 77 again already: this start of it, number 2, is over"
    ):
        after_fault(tmp_path, run, SLURM_RESTART_COUNT="1")


def test_another_job_that_trained_says_nothing_of_this_one(tmp_path: Path) -> None:
    run = run_of(tmp_path, begin(0, 0, slurm_job_id="76", slurm_restart_count="1"))
    Double(tmp_path, "scontrol"), Double(tmp_path, "srun")
    with pytest.raises(NotRequeued, match="before it began to train, and its nodes answer"):
        after_fault(tmp_path, run, SLURM_RESTART_COUNT="2")


def test_where_a_node_is_silent_the_job_is_started_again(tmp_path: Path) -> None:
    Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=1\n")
    Double(tmp_path, "srun", stderr="srun: error: Task launch failed on node n2: Communication failure\n", status=1)
    told = after_fault(tmp_path, tmp_path / "not begun")
    assert told == (
        "job 77 is requeued (1 of at most 10), since a node of it does not answer "
        "(Task launch failed on node n2: Communication failure)"
    )


def test_after_a_fault_a_refusal_leaves_with_the_status_of_the_fault(tmp_path: Path) -> None:
    run = run_of(tmp_path, begin(0, 0))
    with pytest.raises(NotRequeued, match=re.escape("started again 0 times already (launch.max_requeues=0)")) as caught:
        after_fault(tmp_path, run, LaunchConfig(max_requeues=0))
    assert caught.value.exit_code == 137


def test_a_job_that_may_not_be_started_again_does_not_keep_its_nodes_to_try_them(tmp_path: Path) -> None:
    Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=0\n")
    srun = Double(tmp_path, "srun")
    with pytest.raises(NotRequeued, match=re.escape("Slurm may not start job 77 again (--no-requeue")):
        after_fault(tmp_path, run_of(tmp_path))
    assert not srun.calls


def begin_task(launch: int, task: int, step: int, restarts: int = 0) -> dict[str, object]:
    """The line of a launch by a task of array 70. Each task is a job of its own."""
    array = {"slurm_array_job_id": "70", "slurm_array_task_id": str(task), "slurm_restart_count": str(restarts)}
    return begin(launch, step, slurm_job_id=str(71 + task), **array)


def array_of(count: int, last: int) -> dict[str, str]:
    """What Slurm tells a task of its array, from task 0 to ``last``."""
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in (("COUNT", count), ("MIN", 0), ("MAX", last))}


def after_fault_in_task(folder: Path, task: int, run: Path, restarts: int = 0, count: int = 10) -> NotRequeued:
    more = {"SLURM_JOB_ID": str(71 + task), "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": str(task)}
    with pytest.raises(NotRequeued) as caught:
        after_fault(folder, run, SLURM_RESTART_COUNT=str(restarts), **array_of(count, last=9), **more)
    return caught.value


@pytest.mark.parametrize(
    ("lines", "restarts"),
    [
        pytest.param([begin_task(0, 3, 0)], 0, id="that trained"),
        pytest.param(
            [begin_task(0, 1, 0), begin_task(1, 2, 5)], 0, id="that never began, the one before having trained"
        ),
        pytest.param([begin_task(0, 3, 0)], 1, id="that Slurm had started again, and that then never began"),
        pytest.param([begin_task(0, 2, 0, restarts=7)], 0, id="that never began, the one before restarted often"),
    ],
)
def test_after_a_fault_of_a_task_the_arrays_next_one_goes_on(
    tmp_path: Path, lines: list[dict[str, object]], restarts: int
) -> None:
    scontrol, srun = Double(tmp_path, "scontrol"), Double(tmp_path, "srun")
    told = after_fault_in_task(tmp_path, 3, run_of(tmp_path, *lines), restarts)
    assert (str(told), told.exit_code) == ("task 3 of array 70 ends here, the next one goes on", 75)
    assert not scontrol.calls and not srun.calls


def test_tasks_that_an_array_has_not_did_not_fail(tmp_path: Path) -> None:
    """--array 0,5,9: between the tasks 0 and 5 there was none."""
    told = after_fault_in_task(tmp_path, 5, run_of(tmp_path, begin_task(0, 0, 0)), count=3)
    assert (str(told), told.exit_code) == ("task 5 of array 70 ends here, the next one goes on", 75)


@pytest.mark.parametrize(
    ("lines", "where"),
    [
        pytest.param([], "before it began to train", id="no task trained"),
        pytest.param([begin_task(0, 1, 0)], "before it began to train, as the start before it", id="two in a row"),
        pytest.param([begin_task(0, 2, 10), begin_task(1, 3, 10)], TWICE, id="twice from a checkpoint"),
    ],
)
def test_an_array_whose_tasks_would_all_fail_ends(tmp_path: Path, lines: list[dict[str, object]], where: str) -> None:
    """With a status other than 75, at which the job script cancels the tasks that wait."""
    Double(tmp_path, "srun")
    told = after_fault_in_task(tmp_path, 3, run_of(tmp_path, *lines))
    assert told.exit_code == 137
    assert str(told).startswith(f"array 70 ends with task 3: it failed (exit status 137) {where}, and its nodes answer")


def test_where_a_node_is_silent_the_arrays_next_task_goes_on(tmp_path: Path) -> None:
    Double(tmp_path, "srun", stderr="srun: error: Task launch failed on node n2: Communication failure\n", status=1)
    assert after_fault_in_task(tmp_path, 3, run_of(tmp_path)).exit_code == 75
