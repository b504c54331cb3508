"""Nodes and cables fail below a training: it goes on when they are back, or on others, and the parameters it ends with
are those of a run to which nothing has happened.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from hpctrain.metrics.launches import read_launches
from tests.cluster.faults.conftest import STEPS
from tests.cluster.processes import PATIENCE_S
from tests.cluster.slow_disk import SlowDisk, half_written
from tests.cluster.slurm import Slurm
from tests.cluster.slurm_etc import MESSAGE_TIMEOUT_S, NODE_TIMEOUT_S
from tests.cluster.training import LIMIT_S, Training

Start = Callable[..., Training]
Finishes = Callable[[Training], None]

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


def test_a_crashed_node_is_replaced_before_slurm_has_missed_it(slurm: Slurm, start: Start, finishes: Finishes) -> None:
    """Its connections are closed, so that the others' ranks fail at once."""
    training = start(options=())
    lost = training.job.nodes[1]
    slurm.cluster.kill(lost)
    finishes(training)
    assert "after a fault" in training.job.output
    assert training.job.restarts == 1
    assert lost not in training.job.nodes


def test_a_node_lost_before_the_first_step_is_replaced(slurm: Slurm, begin: Start, finishes: Finishes) -> None:
    training = begin(options=())
    training.job.wait_for_output("start 1", LIMIT_S)
    lost = training.job.nodes[1]
    slurm.cluster.kill(lost)
    finishes(training)
    assert lost not in training.job.nodes


def test_a_lost_node_is_replaced_or_waited_for(slurm: Slurm, begin: Start, finishes: Finishes) -> None:
    """By one job that takes what nodes there are, and by another one that has to have this node."""
    disk = SlowDisk(slurm, "both")
    disk.hold()
    replacing = begin(options=(), env=disk.env)
    replacing.job.wait_for("RUNNING", PATIENCE_S)
    nodes = replacing.job.nodes
    waiting = begin(options=(f"--nodelist={','.join(nodes)}",), env=disk.env)
    for training in (replacing, waiting):
        training.job.wait_until(partial(half_written, training), LIMIT_S, "write a checkpoint")
    disk.release()
    for training in (replacing, waiting):
        training.wait_for_checkpoint(5)
    lost = nodes[1]
    slurm.kill_node(lost)
    for training in (replacing, waiting):
        training.job.wait_for("PENDING", NODE_TIMEOUT_S + PATIENCE_S)
    assert slurm.node_states()[lost].startswith("down")
    replacing.job.wait_until(lambda: len(read_launches(replacing.run)) == 2, LIMIT_S, "go on")
    assert waiting.job.state == "PENDING"
    slurm.boot_node(lost)
    waiting.job.wait(LIMIT_S)
    finishes(replacing)
    finishes(waiting)
    assert lost not in {row["host"] for row in replacing.record()["ranks"]}
    assert waiting.job.nodes == nodes
    assert (replacing.job.restarts, waiting.job.restarts) == (1, 1)


def test_a_cable_out_for_five_seconds_is_waited_for(slurm: Slurm, start: Start, finishes: Finishes) -> None:
    training = start()
    slurm.cluster.cut("n2")
    steps = len(training.steps())
    time.sleep(5)
    # One was under way, and the line of the one before may not have been written.
    assert len(training.steps()) <= steps + 2 < STEPS
    slurm.cluster.mend("n2")
    finishes(training)
    assert training.job.restarts == 0


def test_a_cable_out_for_good_loses_the_node(slurm: Slurm, start: Start, finishes: Finishes) -> None:
    """That of rank 0, which lives there until it has waited for long enough, and keeps the run directory."""
    training = start("comm.timeout_s=45", options=())
    lost = training.job.nodes[0]
    slurm.cluster.cut(lost)
    training.job.wait_for("PENDING", NODE_TIMEOUT_S + PATIENCE_S)
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    assert lost not in training.job.nodes
    # Cut off, the node has not heard of the job's end.
    time.sleep(MESSAGE_TIMEOUT_S + 1)
    slurm.rejoin(lost)
    slurm.await_nodes("idle", [lost])
    assert not slurm.strangers()
    finishes(training)
