"""Trainings submitted with the shipped script come to their limits: their time, a disk that is slow, a rank that
stands still, another number of nodes.

The trainings run beside each other, a thread of this process to each: most of their time they wait.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from threading import Event

import psutil
import pytest

from hpctrain.launch.exits import PREEMPTED
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.layout import CHECKPOINTS, LAUNCHES_FILE, checkpoint_name, list_checkpoints, step_of
from tests.cluster.processes import until
from tests.cluster.slow_disk import SlowDisk, half_written
from tests.cluster.slurm import Slurm
from tests.cluster.training import (
    LIMIT_S,
    Training,
    assert_each_sample_once,
    digits_config,
    lines_of,
    record_of,
    submit,
    train_alone,
)
from tests.needs import needs

STEPS = 100
#: how often a checkpoint is flushed before it gets its name: two files of tensors, its manifest, its folder
FLUSHES = 4
LATE_S = 15
#: exit statuses of a job that no fault of a machine has
NO_FAULT = (0, 2, PREEMPTED)

pytestmark = pytest.mark.timeout(3 * LIMIT_S)


@pytest.fixture(scope="module", autouse=True)
def _modules() -> None:
    needs("sklearn", "nvidia.dali", "mpi4py")


@pytest.fixture(scope="module")
def nodes(_slurm_possible: None) -> Iterator[Slurm]:
    """With cables on which a step takes a twentieth of a second."""
    with Slurm(num_nodes=4, tasks_per_node=2, rate="200mbit") as slurm:
        yield slurm


@pytest.fixture(scope="module")
def config(nodes: Slurm) -> Path:
    return digits_config(nodes, STEPS)


@dataclass(frozen=True)
class Stage:
    """What a story has: the cluster, the configuration, and a training to which nothing happens."""

    slurm: Slurm
    config: Path
    alone: Future[Path]
    #: set when the first story is under way, whose time is counted
    limited_has_begun: Event = field(default_factory=Event)

    def submit(
        self,
        *overrides: str,
        where: str,
        nodes: int = 2,
        options: tuple[str, ...] = (),
        env: Mapping[str, str] | None = None,
    ) -> Training:
        options = (f"--nodelist={where}", *options)
        env = {"HPCTRAIN_ENGINE": "mpi", **(env or {})}
        return submit(self.slurm, self.config, *overrides, nodes=nodes, tasks=1, options=options, env=env)

    def processes(self, training: Training, host: str | None = None) -> list[int]:
        """The job's, on ``host`` or anywhere: they all have its run directory among their arguments."""
        hosts = [each for each in self.slurm.cluster.hosts if host in (None, each.name)]
        return [process.pid for each in hosts for process in each.processes() if str(training.run) in words(process)]

    def ends(self, training: Training, state: str) -> None:
        assert training.job.wait(LIMIT_S) == state, training.job.output
        assert until(lambda: not self.processes(training)), self.slurm.strangers(0)

    def finishes(self, training: Training) -> None:
        """As the one to which nothing happens."""
        self.ends(training, "COMPLETED")
        assert training.record()["parameters_sha256"] == record_of(self.alone.result())["parameters_sha256"]
        assert [line["step"] for line in training.steps()] == list(range(1, STEPS + 1))
        assert_each_sample_once(training.run)


def words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def newest_step(training: Training) -> int:
    return step_of(list_checkpoints(training.run / CHECKPOINTS)[0])


def stopped_by_its_time_limit(stage: Stage) -> None:
    """Each checkpoint takes six seconds, far longer than the steps between two."""
    margin_s, flush_s, disk = 88, 1.5, SlowDisk(stage.slurm, "limited")
    disk.delay_s(flush_s)
    overrides = (f"launch.margin_s={margin_s}",)
    training = stage.submit(*overrides, where="n[1-2]", options=("--time=3",), env=disk.env)
    try:
        training.wait_for_checkpoint(5)
    finally:
        stage.limited_has_begun.set()
    at_once, log = [len(half_written(training))], training.run / LAUNCHES_FILE

    def over() -> bool:
        at_once.append(len(half_written(training)))
        return "end" in [line["event"] for line in lines_of(log)]

    training.job.wait_until(over, LIMIT_S, "be stopped")
    disk.release()
    training.job.wait_for_output("is requeued (1 of at most 10)", LIMIT_S)
    stage.finishes(training)
    assert max(at_once) == 1
    assert "stopped by the job's time limit" in training.job.output
    first = read_launches(training.run)[0]
    assert first.preempted and first.write_s >= FLUSHES * flush_s
    # Written the margin before the limit.
    told = re.search(r"the job's time limit is (\S+ \S+): the last checkpoint begins within", training.job.output)
    assert told, training.job.output
    ended = next(line["time"] for line in lines_of(log) if line["event"] == "end")
    assert datetime.fromisoformat(ended) <= datetime.fromisoformat(told[1]).astimezone() - timedelta(seconds=margin_s)


def warned_by_slurm(stage: Stage) -> None:
    """By --signal=B:USR1@60 of the script, 30 to 60 seconds after the start: of two minutes, none is the margin."""
    disk = SlowDisk(stage.slurm, "warned")
    disk.delay_s(1)
    training = stage.submit("launch.margin_s=0", where="n[3-4]", options=("--time=2",), env=disk.env)
    training.job.wait_until(lambda: any(told.preempted for told in read_launches(training.run)), LIMIT_S, "be warned")
    # Where the machine is busy the next start might be warned, too, before it has begun.
    stage.slurm.scontrol(["update", f"jobid={training.job.id}", "timelimit=60"])
    disk.release()
    stage.finishes(training)
    assert "stopped by SIGUSR1" in training.job.output
    assert training.job.restarts >= 1


def a_rank_that_stands_still(stage: Stage) -> None:
    training = stage.submit(f"comm.timeout_s={LATE_S}", where="n[3-4]")
    training.wait_for_step(30)  # the peers learn once a second where it stands
    (rank,) = stage.processes(training, "n4")
    os.kill(rank, signal.SIGSTOP)
    training.job.wait_for_output("is requeued (1 of at most 10), after a fault (exit status ", LIMIT_S)
    place, silence = r"step [1-9]\d*, phase \w+(, part \d+)?", "its process gives no sign of life"
    told = rf"no progress for \d+ s: rank 1 \(host n4\) is late: {place}, {silence}; the others wait in {place};"
    assert re.search(told, training.job.output), training.job.output
    stage.finishes(training)
    assert training.job.restarts == 1


def a_fault_twice_before_the_first_checkpoint(stage: Stage) -> None:
    training = stage.submit("checkpoint.every_steps=1000", where="n[2-3]")
    for start in (1, 2):
        training.job.wait_until(partial(begun, training, start), LIMIT_S, "train")
        for rank in stage.processes(training, "n3"):
            os.kill(rank, signal.SIGKILL)
    stage.ends(training, "FAILED")
    assert training.job.exit_code not in NO_FAULT
    assert training.job.restarts == 1
    assert re.search(r"not started again: it failed .* for the second time since step 0, before", training.job.output)


def begun(training: Training, start: int) -> bool:
    return len(read_launches(training.run)) == start


def cancelled_on_four_nodes_it_goes_on_on_two(stage: Stage) -> None:
    """SIGKILL comes KillWait after SIGTERM, and the checkpoint under way takes longer: the one before counts."""
    disk = SlowDisk(stage.slurm, "cancelled")
    overrides = (f"comm.timeout_s={LATE_S}", "train.max_steps=60")
    training = stage.submit(*overrides, where="n[1-4]", nodes=4, env=disk.env)
    training.wait_for_checkpoint(5)
    disk.hold()
    training.job.wait_until(lambda: half_written(training), LIMIT_S, "write a checkpoint")
    (half,) = half_written(training)
    # Training goes on beside it, until the next one is due; then the peers wait, for as long as it takes.
    training.wait_for_step(newest_step(training) + 10)
    time.sleep(1.5 * LATE_S)
    training.job.cancel()
    stage.ends(training, "CANCELLED")
    assert "no progress" not in training.job.output
    assert half_written(training) == [half]
    step = newest_step(training)

    disk.release()
    other = stage.slurm.shared / "runs/alone"
    shutil.copytree(list_checkpoints(training.run / CHECKPOINTS)[0], other / CHECKPOINTS / checkpoint_name(step))
    twice = (*overrides, "train.batch_per_worker=32")
    job = stage.submit(*twice, where="n[1-2]", env={"HPCTRAIN_RUN_DIR": str(training.run), **disk.env}).job
    train_alone(stage.config, other, 2, *twice)
    training = Training(job, training.run)
    stage.ends(training, "COMPLETED")
    assert f"going on from step {step}" in job.output
    assert training.record()["parameters_sha256"] == record_of(other)["parameters_sha256"]
    assert [launch.world_size for launch in read_launches(training.run)] == [4, 2]
    assert_each_sample_once(training.run)


STORIES = (
    stopped_by_its_time_limit,
    warned_by_slurm,
    a_rank_that_stands_still,
    a_fault_twice_before_the_first_checkpoint,
    cancelled_on_four_nodes_it_goes_on_on_two,
)


@pytest.fixture(scope="module")
def stories(nodes: Slurm, config: Path) -> Iterator[dict[str, Future[None]]]:
    """All of them, begun."""
    with ThreadPoolExecutor() as pool:
        stage = Stage(nodes, config, pool.submit(train_alone, config, nodes.shared / "runs/undisturbed", 2))
        told = {}
        for story in STORIES:
            told[story.__name__] = pool.submit(story, stage)
            stage.limited_has_begun.wait(LIMIT_S)
        yield told


@pytest.mark.parametrize("story", [story.__name__ for story in STORIES])
def test_a_training(stories: dict[str, Future[None]], story: str) -> None:
    stories[story].result()


def test_nothing_is_left(nodes: Slurm, stories: dict[str, Future[None]]) -> None:
    wait(stories.values())
    assert nodes.squeue() == []
    assert not nodes.strangers()
