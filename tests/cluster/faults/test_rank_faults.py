"""A rank dies, a signal comes, daemons below a training restart, its disk is full: it ends as it should or finishes,
and the parameters it ends with are those of a run to which nothing has happened.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hpctrain.launch.exits import PREEMPTED
from hpctrain.metrics.launches import read_launches
from hpctrain.metrics.layout import CHECKPOINTS, list_checkpoints
from hpctrain.topology.hosts import hosts
from tests.cluster.processes import PATIENCE_S
from tests.cluster.slow_disk import SlowDisk, half_written
from tests.cluster.slurm import Slurm
from tests.cluster.training import LIMIT_S, Training, kill_ranks, submit

Start = Callable[..., Training]
Finishes = Callable[[Training], None]

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_a_killed_rank_ends_this_start_and_the_next_one_finishes(
    slurm: Slurm, start: Start, finishes: Finishes, engine: str
) -> None:
    training = start(engine=engine)
    kill_ranks(slurm, "n2")
    finishes(training)
    output = training.job.output
    assert "n2: task 1: Killed" in output, output
    assert "is requeued (1 of at most 10), after a fault (exit status " in output, output
    assert training.record()["launch"]["restarts"] == training.job.restarts == 1


def test_daemons_and_drains_do_not_touch_the_job(slurm: Slurm, start: Start, finishes: Finishes) -> None:
    """Its disk holds it back until all of that has happened."""
    disk = SlowDisk(slurm, "daemons")
    training = start(env=disk.env)
    disk.hold()
    slurm.scontrol(["update", "nodename=n1", "state=drain", "reason=test"])
    slurm.await_nodes("draining", ["n1"])
    slurm.scontrol(["update", "nodename=n1", "state=resume"])
    slurm.signal_daemon("n2", "slurmd", "KILL")
    slurm.stop_controller()
    slurm.start_controller()
    disk.release()
    training.wait_for_step(12)
    slurm.start_slurmd("n2")
    finishes(training)
    assert training.job.restarts == 0
    slurm.await_nodes("idle", slurm.names)


def test_requeued_by_the_administrator(slurm: Slurm, start: Start, finishes: Finishes) -> None:
    """What Slurm's accounts say of both starts stands in the record."""
    training = start()
    training.job.requeue()
    finishes(training)
    assert training.job.restarts == 1
    accounts = training.record()["slurm"]
    first, second = accounts["starts"]
    assert (first["job"], first["state"]) == (training.job.id, "REQUEUED")
    assert list(hosts(second["nodes"])) == training.job.nodes
    assert [step["step"] for step in second["steps"]] == [0, 1, 2]  # a look at the config, the preflight, the training
    assert second["steps"][-1]["state"] == "COMPLETED"
    # A rank that trains holds torch in memory; the nodes have no sensors.
    assert accounts["max_rss_bytes"] > 100 * 2**20
    assert accounts["energy_j"] is None
    assert accounts["elapsed_s"] >= first["elapsed_s"] > 0


def test_where_no_requeue_is_allowed_a_warning_ends_the_job_until_it_is_requeued(
    slurm: Slurm, start: Start, finishes: Finishes
) -> None:
    training = start("launch.max_requeues=0")
    training.job.signal("USR1", batch=True)
    assert (training.job.wait(LIMIT_S), training.job.exit_code) == ("FAILED", PREEMPTED), training.job.output
    assert "has been started again 0 times already (launch.max_requeues=0)" in training.job.output
    slurm.await_nodes("idle", training.job.nodes)
    training.job.requeue()
    finishes(training)
    launch = training.record()["launch"]
    assert (launch["restarts"], launch["preemptions"]) == (1, 1)


def test_the_tasks_of_an_array_take_turns(slurm: Slurm, start: Start, finishes: Finishes) -> None:
    """What a site without requeues has instead."""
    array = start(options=("--nodelist=n[1-2]", "--no-requeue", "--array=0-2%1"))
    first, second, third = (slurm.job(f"{array.job.id}_{task}") for task in range(3))
    # It signals a task again and again, until it complains that this has ended.
    slurm.call(["scancel", "--signal=USR1", "--batch", first.id], check=False)
    assert (first.wait(LIMIT_S), first.exit_code) == ("FAILED", PREEMPTED), first.output
    assert f"task 0 of array {array.job.id} ends here, the next one goes on" in first.output
    finishes(Training(second, array.run))
    assert third.wait(PATIENCE_S) == "CANCELLED"


def test_where_a_requeue_is_forbidden_the_job_ends_with_its_own_status(slurm: Slurm, start: Start) -> None:
    training = start(options=("--no-requeue",))
    training.job.signal("TERM", batch=True)
    assert (training.job.wait(LIMIT_S), training.job.exit_code) == ("FAILED", PREEMPTED), training.job.output
    assert "--no-requeue" in training.job.output
    assert not slurm.strangers()


def test_killed_while_it_writes_a_run_goes_on_from_a_checkpoint_that_is_whole(
    slurm: Slurm, start: Start, finishes: Finishes
) -> None:
    """scancel: SIGTERM, and SIGKILL after KillWait, since a checkpoint takes longer. Then the newest one rots."""
    disk = SlowDisk(slurm, "cancelled")
    training = start(env=disk.env)
    training.wait_for_checkpoint(10)
    disk.hold()
    training.job.wait_until(lambda: half_written(training), LIMIT_S, "write a checkpoint")
    training.job.cancel()
    assert training.job.wait(LIMIT_S) == "CANCELLED", training.job.output
    assert not slurm.strangers()
    assert half_written(training)
    newest = list_checkpoints(training.run / CHECKPOINTS)[0]
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    disk.release()
    training.job.requeue()
    finishes(training)
    assert str(newest) in training.job.output


def test_the_second_of_two_jobs_on_one_run_directory_is_refused(
    slurm: Slurm, begin: Start, start: Start, finishes: Finishes
) -> None:
    """The first one waits for its disk meanwhile."""
    disk = SlowDisk(slurm, "shared")
    first = start(env=disk.env)
    disk.hold()
    preflight = (first.run / "preflight.json").read_bytes()
    second = begin(options=("--nodelist=n[3-4]",), env={"HPCTRAIN_RUN_DIR": str(first.run)}).job
    assert (second.wait(LIMIT_S), second.exit_code) == ("FAILED", 2), second.output
    assert str(first.run) in second.output
    assert first.job.state == "RUNNING"
    assert (first.run / "preflight.json").read_bytes() == preflight
    disk.release()
    finishes(first)
    assert (first.job.restarts, len(read_launches(first.run))) == (0, 1)


def test_a_full_disk_ends_the_job_and_what_was_saved_before_counts(
    slurm: Slurm, config: Path, undisturbed: str
) -> None:
    """On one node, whose folder of runs is a file system of 4 MB: room for the log and one checkpoint.

    With that one it is started again, and twice fails from there.
    """
    runs = slurm.shared / "small-disk"
    runs.mkdir()
    first = slurm.cluster.hosts[0]
    first.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(runs)])
    env = {"HPCTRAIN_ENGINE": "mpi", "HPCTRAIN_RUNS": str(runs)}
    training = submit(slurm, config, nodes=1, tasks=2, options=("--nodelist=n1",), env=env)
    assert (training.job.wait(LIMIT_S), training.job.exit_code) == ("FAILED", 1), training.job.output
    assert training.job.output.count("No space left on device") >= 3
    assert "it failed (exit status 1) for the second time since step 5, before a checkpoint" in training.job.output
    assert not slurm.strangers()
    first.run(["mount", "-o", "remount,size=100m", str(runs)])
    training.job.requeue()
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    record = json.loads(first.run(["cat", str(runs / training.run.name / "record.json")]).stdout)
    assert record["parameters_sha256"] == undisturbed
    assert record["launch"]["restarts"] == 3
