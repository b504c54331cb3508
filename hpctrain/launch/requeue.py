"""The command `requeue`: called by a batch script whose ranks left before the run was over, outside of any container.

It asks Slurm to start this job anew, at most ``launch.max_requeues`` times; the run goes on in its run directory.
Ranks that left with ``exits.PREEMPTED`` may always go on. After a fault it is worth while where a node was lost, where
this start has written a checkpoint, and once from each checkpoint: what fails twice from there would fail a third time.
A start that failed before it began to train is repeated once, if an earlier one of the same job has trained.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hpctrain.config.launch import LaunchConfig
from hpctrain.errors import HpctrainError, MachineError, UserError
from hpctrain.launch.durations import parse_duration
from hpctrain.launch.exits import PREEMPTED
from hpctrain.launch.slurm import SlurmRefusal, ask_slurm
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.layout import CHECKPOINTS, list_checkpoints, step_of
from hpctrain.topology.voice import sentence

_REMEDY = "to go on, submit it again with HPCTRAIN_RUN_DIR set to its run directory"

#: What Slurm says of a job that it is ending itself. Cancelled, it is not to start again; preempted, Slurm starts it.
_ENDING = ("COMPLETING", "CANCELLED", "PREEMPTED")

#: for every node to begin and end a step of nothing; a healthy one takes a fraction of a second
_ANSWER_S = 60.0
#: Slurm's controller may be away for as long as another one takes its place.
_PATIENCE_S = 300.0
_AGAIN_S = 10.0


class NotRequeued(UserError):
    """The job ends here, and its run is not over; ``exit_code`` is what the job is to leave with."""

    def __init__(self, text: str, exit_code: int) -> None:
        super().__init__(text)
        self.exit_code = exit_code


def requeue(config: LaunchConfig, environ: Mapping[str, str], run_dir: Path, status: int) -> str:
    """Have Slurm start the job that ``environ`` tells of again; what was done, as one sentence.

    Its ranks trained in ``run_dir`` and left with ``status``. Raises NotRequeued where the job may not be started again
    or another start promises nothing, UserError outside of a job.
    """
    job, restarts = _job_of(environ), int(environ.get("SLURM_RESTART_COUNT", "0"))
    why = "" if status == PREEMPTED else f", {_promise(job, restarts, environ, run_dir, status)}"
    if "SLURM_ARRAY_JOB_ID" in environ:
        raise NotRequeued(_hand_over(environ), PREEMPTED)
    try:
        if reason := _refusal(job, restarts, config, environ):
            raise NotRequeued(reason, status)
        _ask_patiently(["scontrol", "requeue", job], environ)
    except (SlurmRefusal, MachineError) as error:
        raise NotRequeued(f"Slurm does not start job {job} again ({error}): {_REMEDY}", status) from None
    return f"job {job} is requeued ({restarts + 1} of at most {config.max_requeues}){why}"


def _job_of(environ: Mapping[str, str]) -> str:
    job = environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise UserError("there is no job to requeue (SLURM_JOB_ID is not set): `hpctrain requeue` is for job scripts")
    return job


def _promise(job: str, restarts: int, environ: Mapping[str, str], run_dir: Path, status: int) -> str:
    """Why another start may go on where this one failed. Raises NotRequeued if it would fail there too."""
    hopeless = _hopeless(run_dir, job, restarts)
    if not hopeless:
        return f"after a fault (exit status {status})"
    if silence := _silence(environ):
        return f"since a node of it does not answer ({silence})"
    raise NotRequeued(
        f"job {job} is not started again: it failed (exit status {status}) {hopeless}, and its nodes answer; "
        f"find the fault above, then {_REMEDY.removeprefix('to go on, ')}",
        status,
    )


def _hopeless(run_dir: Path, job: str, restarts: int) -> str | None:
    """Where this start of the job failed, if another one would fail there too; None if it promises something."""
    launches = read_launches(run_dir)
    last = next((launch for launch in reversed(launches) if launch.job == job), None)
    if last is None:
        return "before it began to train"
    not_begun = restarts - last.restarts
    if not_begun > 1:
        return "before it began to train, as the start before it"
    # Below 0 this start is one that Slurm has given up; `_refusal` says so.
    if not_begun:
        return None
    if any(step_of(path) > last.step for path in list_checkpoints(run_dir / CHECKPOINTS)):
        return None
    before = launches[last.number - 1] if last.number else None
    failed_before = before is not None and before.step == last.step and not before.ended
    return f"for the second time since step {last.step}, before a checkpoint" if failed_before else None


def _silence(environ: Mapping[str, str]) -> str | None:
    """What srun says of a node on which it cannot run anything, or None when all nodes of the job answer.

    Slurm itself misses a node only after its SlurmdTimeout, minutes from now.
    """
    nodes = environ["SLURM_JOB_NUM_NODES"]
    alone = ["--ntasks-per-node=1", "--cpus-per-task=1", "--mem=0", "--overlap", "--mpi=none", "--kill-on-bad-exit=1"]
    try:
        ask_slurm(["srun", f"--nodes={nodes}", f"--ntasks={nodes}", *alone, "true"], environ, _ANSWER_S)
    except HpctrainError as error:
        return str(error)
    return None


def _refusal(job: str, restarts: int, config: LaunchConfig, environ: Mapping[str, str]) -> str | None:
    """Why the job may not be started again, or None where it may."""
    if restarts >= config.max_requeues:
        return (
            f"job {job} has been started again {restarts} times already (launch.max_requeues={config.max_requeues}): "
            f"find out why it is stopped so often; {_REMEDY}"
        )
    facts = _ask_patiently(["scontrol", "show", "job", "--oneliner", job], environ)
    # On a node that was cut off, the script of a start that Slurm has given up long since may still come here.
    if (_fact("Restarts", facts) or str(restarts)) != str(restarts):
        return f"Slurm has started job {job} again already: this start of it, number {restarts + 1}, is over"
    # The ranks of a cancelled job leave with the same status, and Slurm would start it again if it were asked to.
    if (state := _fact("JobState", facts)) in _ENDING and not _ran_to_its_limit(facts):
        return f"job {job} was cancelled or preempted ({state}) and is not started again from here: {_REMEDY}"
    if _fact("Requeue", facts) == "0":
        return f"Slurm may not start job {job} again (--no-requeue, or the site's JobRequeue=0): {_REMEDY}"
    return None


def _ask_patiently(argv: Sequence[str], environ: Mapping[str, str]) -> str:
    """As ``ask_slurm``, for ``_PATIENCE_S`` while Slurm does not answer. That it is away is said once."""
    deadline, said = time.monotonic() + _PATIENCE_S, False
    while True:
        try:
            return ask_slurm(argv, environ)
        except MachineError as silence:
            if time.monotonic() >= deadline:
                raise
            if not said:
                again = f"it is asked again for {_PATIENCE_S / 60:.0f} minutes"
                print(f"{sentence(silence)}; {again}", file=sys.stderr, flush=True)
            said = True
            time.sleep(_AGAIN_S)


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
