"""hpctrain requeue: when Slurm is asked to start a job again, and what is said when it is not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hpctrain.config.launch import LaunchConfig
from hpctrain.errors import UserError
from hpctrain.launch.requeue import NotRequeued, requeue
from tests.unit.slurm_doubles import Double


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{folder}:/usr/bin:/bin", "SLURM_JOB_ID": "77", **more}


def not_requeued(folder: Path, config: LaunchConfig | None = None, **more: str) -> str:
    with pytest.raises(NotRequeued) as caught:
        requeue(config or LaunchConfig(), environment(folder, **more))
    assert caught.value.exit_code == 75
    return str(caught.value)


@pytest.mark.parametrize(("restarts", "number"), [({}, 1), ({"SLURM_RESTART_COUNT": "3"}, 4)])
def test_a_job_is_started_again(tmp_path: Path, restarts: dict[str, str], number: int) -> None:
    scontrol = Double(tmp_path, "scontrol", stdout="JobId=77 Requeue=1 Restarts=0\n")
    told = requeue(LaunchConfig(), environment(tmp_path, **restarts))
    assert told == f"job 77 is requeued ({number} of at most 10)"
    assert scontrol.calls == [["show", "job", "--oneliner", "77"], ["requeue", "77"]]


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
    assert requeue(LaunchConfig(), environment(tmp_path)).startswith("job 77 is requeued")
    assert scontrol.calls[-1] == ["requeue", "77"]


def test_slurm_may_refuse(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/bash\n[[ $1 == show ]] && exit\necho "Job is completing" >&2\nexit 1\n')
    (tmp_path / "scontrol").chmod(0o755)
    assert not_requeued(tmp_path).startswith("Slurm does not start job 77 again (Job is completing)")


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
        requeue(LaunchConfig(), {})
    assert caught.value.exit_code == 2
