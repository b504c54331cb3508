"""The command `requeue`: called by a batch script whose ranks left before the run was over, outside of any container.

It asks Slurm to start this job anew, at most ``launch.max_requeues`` times; the run goes on in its run directory.
Ranks that left with ``exits.PREEMPTED`` may always go on. After a fault it is worth while where a node was lost, where
this start has written a checkpoint, and once from each checkpoint: what fails twice from there would fail a third time.
A start that failed before it began to train is repeated once, if an earlier one of the same job has trained. The tasks
of an array are starts of one job, and Slurm need not be asked for the next one: it follows unless this one says no.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.config.launch import LaunchConfig
from hpctrain.errors import HpctrainError, MachineError, UserError
from hpctrain.launch.durations import parse_duration
from hpctrain.launch.exits import PREEMPTED
from hpctrain.launch.slurm import SlurmRefusal, ask_slurm
from hpctrain.metrics.launches import Launch, read_launches
from hpctrain.metrics.layout import CHECKPOINTS, LAUNCHES_FILE, list_checkpoints
from hpctrain.topology.voice import sentence

_RESUBMIT = "submit it again with HPCTRAIN_RUN_DIR set to its run directory"
_REMEDY = f"to go on, {_RESUBMIT}"

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


@dataclass(frozen=True)
class _Start:
    """This start of a job, in Slurm's numbers. ``array`` is None for a job that is in none; one with ``gaps`` has not
    all numbers from its first task to its last.
    """

    job: str
    restarts: int
    array: str | None
    task: int
    gaps: bool

    def follows(self, launch: Launch) -> bool:
        """Whether ``launch`` was of the same job, the tasks of an array being one."""
        return launch.job == self.job if self.array is None else launch.array == self.array

    def starts_since(self, launch: Launch) -> int:
        """How many starts after that of ``launch`` this one is; 0 for the same, and 1 where it cannot be told."""
        if self.task == launch.task:
            return self.restarts - launch.slurm_restarts
        tasks = self.task - launch.task
        return min(tasks, 1) if self.gaps else tasks


def requeue(config: LaunchConfig, environ: Mapping[str, str], run_dir: Path, status: int) -> str:
    """Have Slurm start the job that ``environ`` tells of again; what was done, as one sentence.

    Its ranks trained in ``run_dir`` and left with ``status``. Raises NotRequeued where the job may not be started again
    or another start promises nothing, UserError outside of a job.
    """
    start = _start_of(environ)
    if start.array is not None:
        _promise(start, environ, run_dir, status)
        raise NotRequeued(_hand_over(start, environ), PREEMPTED)
    try:
        if reason := _refusal(start, config, environ):
            raise NotRequeued(reason, status)
        promise = _promise(start, environ, run_dir, status)
        _ask_patiently(["scontrol", "requeue", start.job], environ)
    except (SlurmRefusal, MachineError) as error:
        raise NotRequeued(f"Slurm does not start job {start.job} again ({error}): {_REMEDY}", status) from None
    return f"job {start.job} is requeued ({start.restarts + 1} of at most {config.max_requeues}){promise}"


def _start_of(environ: Mapping[str, str]) -> _Start:
    job = environ.get("SLURM_JOB_ID", "")
    if not job.isdecimal():
        raise UserError("there is no job to requeue (SLURM_JOB_ID is not set): `hpctrain requeue` is for job scripts")
    restarts, task, first, last, count = (
        int(environ.get(f"SLURM_{name}", "0"))
        for name in ("RESTART_COUNT", "ARRAY_TASK_ID", "ARRAY_TASK_MIN", "ARRAY_TASK_MAX", "ARRAY_TASK_COUNT")
    )
    return _Start(job, restarts, environ.get("SLURM_ARRAY_JOB_ID"), task, gaps=count < last - first + 1)


def _promise(start: _Start, environ: Mapping[str, str], run_dir: Path, status: int) -> str:
    """Why another start may get further, as the end of a sentence. Raises NotRequeued if it would fail there too."""
    if status == PREEMPTED:
        return ""
    failure = _hopeless_failure(start, run_dir, status)
    if failure is None:
        return f", after a fault (exit status {status})"
    if silence := _silent_node(environ):
        return f", since a node of it does not answer ({silence})"
    end = (
        f"job {start.job} is not started again"
        if start.array is None
        else f"array {start.array} ends with task {start.task}"
    )
    raise NotRequeued(f"{end}: {failure}, and its nodes answer; find the fault above, then {_RESUBMIT}", status)


def _hopeless_failure(start: _Start, run_dir: Path, status: int) -> str | None:
    """How this start failed, as a clause, if another one would fail there too; None where that may get further."""
    failed = f"it failed (exit status {status})"
    launches = read_launches(run_dir)
    last = next((launch for launch in reversed(launches) if start.follows(launch)), None)
    if last is None:
        return f"{failed} before it began to train"
    not_begun = start.starts_since(last)
    if not_begun > 1:
        return f"{failed} before it began to train, as the start before it"
    # Below 0 this start is one that Slurm has given up, whose word does not count.
    if not_begun:
        return None
    # Of later steps there may be spoilt ones too, which this launch has passed over. The list was last written to when
    # it began, by the clock of the same file system.
    began_s = (run_dir / LAUNCHES_FILE).stat().st_mtime
    if last.ended or any(path.stat().st_mtime >= began_s for path in list_checkpoints(run_dir / CHECKPOINTS)):
        return None
    before = launches[last.number - 1] if last.number else None
    if before is None or before.ended or before.step != last.step:
        return None
    return f"{failed} for the second time since step {last.step}, before a checkpoint"


def _silent_node(environ: Mapping[str, str]) -> str | None:
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


def _refusal(start: _Start, config: LaunchConfig, environ: Mapping[str, str]) -> str | None:
    """Why the job may not be started again, or None where it may."""
    job, restarts = start.job, start.restarts
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


def _hand_over(start: _Start, environ: Mapping[str, str]) -> str:
    """What an array's task has to say: the next one takes its place, if there is a next one."""
    if str(start.task) == environ.get("SLURM_ARRAY_TASK_MAX"):
        return f"task {start.task} was the last of array {start.array}: {_REMEDY}"
    return f"task {start.task} of array {start.array} ends here, the next one goes on"
