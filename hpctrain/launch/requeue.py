"""The command `requeue`: called by a batch script whose ranks left with ``exits.PREEMPTED``, outside of any container.

It asks Slurm to start this job anew, at most ``launch.max_requeues`` times; the run goes on in its run directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from hpctrain.config.launch import LaunchConfig
from hpctrain.errors import UserError
from hpctrain.launch.durations import parse_duration
from hpctrain.launch.exits import PREEMPTED
from hpctrain.launch.slurm import SlurmRefusal, ask_slurm

_REMEDY = "to go on, submit it again with HPCTRAIN_RUN_DIR set to its run directory"

#: What Slurm says of a job that it is ending itself. Cancelled, it is not to start again; preempted, Slurm starts it.
_ENDING = ("COMPLETING", "CANCELLED", "PREEMPTED")


class NotRequeued(UserError):
    """The job ends here, and its run is not over."""

    exit_code = PREEMPTED


def requeue(config: LaunchConfig, environ: Mapping[str, str]) -> str:
    """Have Slurm start the job that ``environ`` tells of again; what was done, as one sentence.

    Raises NotRequeued where the job may not or need not be started again, UserError outside of a job.
    """
    job = environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise UserError("there is no job to requeue (SLURM_JOB_ID is not set): `hpctrain requeue` is for job scripts")
    if "SLURM_ARRAY_JOB_ID" in environ:
        raise NotRequeued(_hand_over(environ))
    restarts = int(environ.get("SLURM_RESTART_COUNT", "0"))
    if restarts >= config.max_requeues:
        raise NotRequeued(
            f"job {job} has been started again {restarts} times already (launch.max_requeues={config.max_requeues}): "
            f"find out why it is stopped so often; {_REMEDY}"
        )
    facts = ask_slurm(["scontrol", "show", "job", "--oneliner", job], environ)
    # The ranks of a cancelled job leave with the same status, and Slurm would start it again if it were asked to.
    if (state := _fact("JobState", facts)) in _ENDING and not _ran_to_its_limit(facts):
        raise NotRequeued(
            f"job {job} was cancelled or preempted ({state}) and is not started again from here: {_REMEDY}"
        )
    if _fact("Requeue", facts) == "0":
        raise NotRequeued(f"Slurm may not start job {job} again (--no-requeue, or the site's JobRequeue=0): {_REMEDY}")
    try:
        ask_slurm(["scontrol", "requeue", job], environ)
    except SlurmRefusal as refusal:
        raise NotRequeued(f"Slurm does not start job {job} again ({refusal}): {_REMEDY}") from None
    return f"job {job} is requeued ({restarts + 1} of at most {config.max_requeues})"


def _fact(key: str, facts: str) -> str | None:
    """The value of ``key`` in a line of `scontrol show job`."""
    match = re.search(rf"(?<!\S){key}=(\S+)", facts)
    return match and match[1]


def _ran_to_its_limit(facts: str) -> bool:
    run, limit = (parse_duration(_fact(key, facts) or "") for key in ("RunTime", "TimeLimit"))
    return run is not None and limit is not None and run >= limit


def _hand_over(environ: Mapping[str, str]) -> str:
    """What an array's task has to say: the next one takes its place, if there is a next one."""
    task, last = environ.get("SLURM_ARRAY_TASK_ID", ""), environ.get("SLURM_ARRAY_TASK_MAX", "")
    if task == last:
        return f"task {task} was the last of array {environ['SLURM_ARRAY_JOB_ID']}: {_REMEDY}"
    return f"task {task} of array {environ['SLURM_ARRAY_JOB_ID']} ends here, the next one goes on"
