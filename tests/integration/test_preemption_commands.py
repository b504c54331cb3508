"""Whole jobs that are asked to end, or killed: all ranks leave alike, and a later launch goes on as if nothing was."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from hpctrain.launch.exits import PREEMPTED
from hpctrain.metrics.launches import read_launches
from hpctrain.train.checkpoint import load_checkpoint
from hpctrain.train.samples import samples_seen
from tests.integration.commands import LIMIT_S, Job, Ranks, train, train_argv, write_config
from tests.parallel.launch import environment
from tests.unit.small_runs import record_of, saved_steps

pytestmark = pytest.mark.timeout(900)

#: 1,438 pictures in steps of 24
STEPS_AN_EPOCH = 59
TWO = Ranks("mpi", "mpirun", 2)
#: what the launcher makes of ranks that all leave with 75, as the README says
CASES = [
    pytest.param(Ranks("mpi", "mpirun", 2), 75, id="mpirun"),
    pytest.param(Ranks("horovod", "horovodrun-mpi", 2), 75, id="horovodrun-mpi"),
    pytest.param(Ranks("horovod", "horovodrun-gloo", 2), 1, id="horovodrun-gloo"),
    pytest.param(Ranks("torch", "torchrun", 3), 1, id="torchrun"),
]


@pytest.fixture(scope="module")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "preempt.yaml",
        model={"name": "dense", "neurons": 50, "dropout": 0.1},
        data={
            "path": str(digits),
            "loader": "torch",
            "threads": 1,
            "image_size": 8,
            "channels": 1,
            "log_samples": True,
        },
        train={"epochs": 500, "batch_per_worker": 12, "eval_every_epochs": 100},
        gradients={"reduction": "ordered"},
        checkpoint={"every_steps": 100},
        log={"every_steps": 10, "tensorboard": False},
    )


def steps_logged(run: Path) -> int:
    path = run / "steps.jsonl"
    return 10 * len(path.read_text().splitlines()) if path.exists() else 0


def preempt(ranks: Ranks, config: Path, run: Path, number: signal.Signals, rank: int) -> tuple[int | None, str]:
    """Start a run, send ``number`` to one of its ranks after some steps, and once more soon after."""
    with Job(ranks, *train_argv(ranks, config, run)) as job:
        job.wait_until(lambda: steps_logged(run) >= 20)
        job.signal_rank(rank, number)
        time.sleep(0.5)
        job.signal_rank(rank, number)
        done = job.end()
    assert not done.timed_out, done.output[-6000:]
    assert done.survivors == 0
    return done.returncode, done.output


@pytest.mark.parametrize(("ranks", "status"), CASES)
def test_a_signal_to_one_rank_ends_all_at_one_step(ranks: Ranks, status: int, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    code, output = preempt(ranks, config, run, signal.SIGUSR1, rank=1)
    assert code == status, output[-6000:]
    if status != PREEMPTED:
        assert re.search(r"exit ?code *: *75", output, re.IGNORECASE), output[-6000:]
    last = saved_steps(run)[-1]
    assert output.count("stopped by SIGUSR1 on rank 1 (host ") == 1, output[-6000:]
    assert f"after step {last}, its checkpoint is written (exit status 75)" in output
    assert "no progress" not in output
    assert "failed in step" not in output
    assert load_checkpoint(run / f"checkpoints/step-{last:06d}").step == last
    (launch,) = read_launches(run)
    assert launch.preempted
    assert launch.write_s > 0


def test_a_signal_that_is_not_listed_is_nothing_to_the_ranks(config: Path, tmp_path: Path) -> None:
    """A job script passes on what Slurm was asked to send, whatever the configuration says."""
    run = tmp_path / "run"
    with Job(TWO, *train_argv(TWO, config, run, "launch.signals=[USR2]")) as job:
        job.wait_until(lambda: steps_logged(run) >= 20)
        for rank in (0, 1):
            job.signal_rank(rank, signal.SIGUSR1)
        at = steps_logged(run)
        job.wait_until(lambda: steps_logged(run) >= at + 50)
        job.signal_rank(1, signal.SIGUSR2)
        done = job.end()
    assert (done.returncode, done.timed_out) == (PREEMPTED, False), done.output[-6000:]
    assert "stopped by SIGUSR2 on rank 1" in done.output


def test_each_sample_counts_once_over_a_preemption_a_kill_and_another_number_of_ranks(
    config: Path, tmp_path: Path
) -> None:
    """SIGTERM to one of two ranks, then SIGKILL to all, then to the end; the log of samples proves each epoch."""
    run = tmp_path / "run"
    preempt(TWO, config, run, signal.SIGTERM, rank=0)
    preempted_at = saved_steps(run)[-1]
    with Job(TWO, *train_argv(TWO, config, run)) as job:
        job.wait_until(lambda: saved_steps(run)[-1] >= preempted_at + 150)
        job.kill()
        assert job.end().returncode != 0
    steps = saved_steps(run)[-1] + 150
    four = Ranks("mpi", "mpirun", 4)
    done = train(four, config, run, f"train.max_steps={steps}", "train.batch_per_worker=6")
    assert "going on from step" in done.output
    record = record_of(run)
    assert record["launch"]["restarts"] == 2
    assert record["launch"]["preemptions"] == 1
    assert [launch.world_size for launch in read_launches(run)] == [2, 2, 4]
    assert record["steps"] == steps
    counts = samples_seen(run)
    whole, rest = divmod(steps, STEPS_AN_EPOCH)
    assert [int(seen.sum()) for seen in counts.values()] == [24 * STEPS_AN_EPOCH] * whole + [24 * rest] * (rest > 0)
    assert all(seen.max() == 1 for seen in counts.values()), "no sample twice in an epoch"


def stop_soon(words: list[str], folder: Path, reached: Callable[[], bool]) -> str:
    """Run ``words`` in ``folder`` until it has ``reached`` so far, ask it to stop, and return what it printed."""
    argv = [sys.executable, "-m", *words]
    with subprocess.Popen(argv, cwd=folder, env=environment({}), stdout=PIPE, stderr=STDOUT, text=True) as process:
        try:
            while not reached():
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.01)
            process.send_signal(signal.SIGUSR1)
            output: str = process.communicate(timeout=LIMIT_S)[0]
        finally:
            process.kill()
    assert process.returncode == PREEMPTED, output
    return output


def test_the_line_that_is_printed_continues_a_run_whose_directory_nobody_named(tmp_path: Path) -> None:
    """Also where it has to be quoted."""
    write_config(
        tmp_path / "my recipe.yaml",
        model={"name": "dense", "neurons": 8},
        data={"loader": "synthetic", "image_size": 4, "channels": 1, "num_classes": 7, "synthetic_samples": 1000},
        train={"epochs": 100_000, "batch_per_worker": 8, "device": "cpu", "eval_every_epochs": None},
        log={"every_steps": 10, "tensorboard": False},
    )
    runs = tmp_path / "runs"
    typed = ["hpctrain", "train", "my recipe.yaml", "--set", "schedule={kind: constant, lr: 0.01}"]
    told = stop_soon(typed, tmp_path, lambda: any(steps_logged(run) for run in runs.glob("*")))
    (run,) = runs.iterdir()
    (line,) = (line for line in told.splitlines() if line.startswith("to continue: "))
    words = shlex.split(line.removeprefix("to continue: "))
    assert words == [*typed, "--run-dir", f"runs/{run.name}"]
    stopped_at = saved_steps(run)[-1]
    told = stop_soon(words, tmp_path, lambda: steps_logged(run) > stopped_at + 10)
    assert f"going on from step {stopped_at}" in told
    assert line in told.splitlines(), "and so on"
    assert list(runs.iterdir()) == [run]
    assert [launch.step for launch in read_launches(run)] == [0, stopped_at]


def test_a_kill_while_it_stops_leaves_a_sound_checkpoint(config: Path, tmp_path: Path) -> None:
    """As Slurm does when KillWait is over."""
    run = tmp_path / "run"
    with Job(TWO, *train_argv(TWO, config, run)) as job:
        job.wait_until(lambda: len(saved_steps(run)) > 0)
        job.signal_rank(0, signal.SIGTERM)
        job.wait_until(lambda: (run / "launches.jsonl").exists())
        time.sleep(1.0)
        job.kill()
        job.end()
    newest = saved_steps(run)[-1]
    assert load_checkpoint(run / f"checkpoints/step-{newest:06d}").step == newest
