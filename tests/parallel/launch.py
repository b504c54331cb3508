"""Start small jobs of several ranks from a test, collect what each rank reports, and leave no process behind.

A worker is a script, a module or any command. It hands a JSON value back with ``report(value)``. ::

    rows = run_ranks("torch", 2, "tests/parallel/contract.py", ["--engine", "torch"], timeout_s=60)
    run = launch("mpirun", 2, [sys.executable, "-m", "hpctrain", "train", "x.yaml"], timeout_s=60)
    assert run.returncode == 0, run.output

Ranks run from the repository's root with one OpenMP thread each. At the time limit the whole job is killed and
``run.timed_out`` is set; processes found alive after a job has ended are killed too, and counted in
``run.survivors``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
RESULTS = "HPCTRAIN_TEST_RESULTS"
JOB = "HPCTRAIN_TEST_JOB"
GRACE_S = 5.0

#: the launcher that a user of an engine would type first
LAUNCHER_OF_ENGINE = {"serial": "plain", "horovod": "horovodrun", "mpi": "mpirun", "torch": "torchrun"}

_PYTHON_DIRECTORY = str(Path(sys.executable).parent)
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python", "--nproc-per-node"]
_PREFIX_OF_LAUNCHER = {
    "plain": [],
    "mpirun": ["mpirun", "--oversubscribe", "--allow-run-as-root", "-np"],
    "horovodrun": ["horovodrun", "-np"],
    "horovodrun-gloo": ["horovodrun", "--gloo", "-np"],
    "horovodrun-mpi": ["horovodrun", "--mpi", "-np"],
    "torchrun": _TORCHRUN,
}
#: variables of a launcher around the test run itself that the job must not inherit
_FOREIGN = (
    "RANK",
    "WORLD_SIZE",
    "OMPI_COMM_",
    "PMIX_",
    "PMI_",
    "HOROVOD_",
    "TORCHELASTIC_",
    "SLURM_",
    "SBATCH_",
    "SRUN_",
)


@dataclass(frozen=True)
class Run:
    """What became of one job: ``output`` holds stdout and stderr of all ranks as they came."""

    returncode: int
    output: str
    wall_s: float
    timed_out: bool
    survivors: int
    results: dict[int, Any] = field(default_factory=dict)


def report(value: Any) -> None:
    """Hand ``value`` (JSON) to the test that launched this rank; the last call counts."""
    from hpctrain.topology.ranks import detect

    path = Path(os.environ[RESULTS]) / f"{detect(os.environ).rank}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.replace(path)


def launch(
    launcher: str,
    num_ranks: int,
    command: Sequence[str],
    timeout_s: float,
    env: Mapping[str, str] | None = None,
) -> Run:
    """Run ``command`` on ``num_ranks`` ranks under ``launcher`` and wait for its end, at most ``timeout_s``.

    ``launcher`` is plain, mpirun, horovodrun (its own choice of controller), horovodrun-gloo, horovodrun-mpi or
    torchrun. ``env`` is added to the environment of every rank.
    """
    prefix = _PREFIX_OF_LAUNCHER[launcher]
    return run_job([*prefix, *([str(num_ranks)] if prefix else []), *command], timeout_s, env)


def run_job(
    argv: Sequence[str], timeout_s: float, env: Mapping[str, str] | None = None, scratch: Path | None = None
) -> Run:
    """Run ``argv``, which starts ranks, as ``launch`` does; ``scratch`` is a folder that ranks of several hosts share.

    On one host the job has a folder for temporary files to itself: a killed mpirun leaves its session's there, and
    the next that is given its process id cannot start beside it.
    """
    job = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="hpctrain-job-", dir=scratch) as folder:
        log = Path(folder) / "output"
        started = time.monotonic()
        with log.open("wb") as sink:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=environment({RESULTS: folder, JOB: job, **({} if scratch else {"TMPDIR": folder}), **(env or {})}),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                timed_out = _wait(process, timeout_s)
            finally:
                wall_s = time.monotonic() - started
                survivors = _kill_survivors(job)
        results = {int(path.stem): json.loads(path.read_text()) for path in Path(folder).glob("*.json")}
        output = log.read_text(errors="replace")
    return Run(process.returncode, output, wall_s, timed_out, survivors, results)


def run_ranks(
    engine: str,
    num_ranks: int,
    script: str,
    args: Sequence[str] = (),
    timeout_s: float = 120.0,
    launcher: str | None = None,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """What each rank of ``script`` reported, in rank order; AssertionError with the output when the job failed.

    ``script`` is a path from the repository's root, or a dotted module. ``launcher`` defaults to the engine's own.
    """
    target = [script] if script.endswith(".py") else ["-m", script]
    run = launch(launcher or LAUNCHER_OF_ENGINE[engine], num_ranks, [sys.executable, *target, *args], timeout_s, env)
    missing = sorted(set(range(num_ranks)) - set(run.results))
    if run.returncode or missing:
        raise AssertionError(
            f"{engine} on {num_ranks} ranks: exit {run.returncode}, timed out: {run.timed_out}, "
            f"no result from ranks {missing}\n{run.output[-8000:]}"
        )
    return [run.results[rank] for rank in range(num_ranks)]


def environment(extra: Mapping[str, str]) -> dict[str, str]:
    """What a job finds set: nothing of a launcher around the tests, programs beside this Python, one thread a rank."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    return {
        **clean,
        "PATH": _PYTHON_DIRECTORY + os.pathsep + clean.get("PATH", ""),
        "PYTHONPATH": str(ROOT) + os.pathsep + clean.get("PYTHONPATH", ""),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        # Ranks outnumber cores: spinning ranks would starve the one that has work.
        "OMPI_MCA_mpi_yield_when_idle": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        # Looked for and not found, this network costs each start of MPI a second of sleep.
        "OMPI_MCA_btl": "^ofi",
        **extra,
    }


def _wait(process: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """True when the limit was reached; the launcher is over in any case."""
    try:
        process.wait(timeout_s)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def _kill_survivors(job: str) -> int:
    """Launchers put ranks into sessions of their own, so they are found by a mark in their environment."""
    deadline = time.monotonic() + GRACE_S
    while (alive := _members(job)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for member in alive:
        member.kill()
    psutil.wait_procs(alive, timeout=GRACE_S)
    return len(alive)


def _members(job: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(JOB) == job and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
