"""Machines fail below a training that was submitted with the shipped script: it ends as it should or finishes, no
process is left on any node, and the parameters it ends with are those of a run that nothing has happened to.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpctrain.launch.exits import PREEMPTED
from tests.cluster.slurm import Slurm
from tests.cluster.slurm_etc import NODE_TIMEOUT_S
from tests.cluster.training import LIMIT_S, Training, digits_config, record_of, submit, train_alone
from tests.needs import needs

STEPS, NODES = 24, 2
#: of the cables: a step takes a quarter of a second, in which the cores do little, so that faults find it at work
RATE = "40mbit"

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


@pytest.fixture(scope="module", autouse=True)
def _modules() -> None:
    needs("sklearn", "nvidia.dali", "mpi4py", "horovod")


@pytest.fixture(scope="module")
def _nodes(_slurm_possible: None) -> Iterator[Slurm]:
    with Slurm(num_nodes=4, tasks_per_node=2, rate=RATE) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def config(_nodes: Slurm) -> Path:
    return digits_config(_nodes, STEPS)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the parameters after all steps."""
    run = train_alone(config, tmp_path_factory.mktemp("alone") / "run", NODES)
    digest: str = record_of(run)["parameters_sha256"]
    return digest


@pytest.fixture
def start(slurm: Slurm, config: Path) -> Callable[..., Training]:
    """Submit on n1 and n2, or where told, and wait until the checkpoint of step 5 is there."""

    def submitted(*overrides: str, options: tuple[str, ...] = ("--nodelist=n[1-2]",), engine: str = "mpi") -> Training:
        env = {"HPCTRAIN_ENGINE": engine}
        training = submit(slurm, config, *overrides, nodes=NODES, tasks=1, options=options, env=env)
        training.wait_for_checkpoint(5)
        return training

    return submitted


def finishes(slurm: Slurm, training: Training, undisturbed: str) -> None:
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    assert training.record()["parameters_sha256"] == undisturbed
    assert [line["step"] for line in training.steps()] == list(range(1, STEPS + 1))
    assert not slurm.strangers()


def ranks_on(slurm: Slurm, name: str) -> list[int]:
    host = next(host for host in slurm.cluster.hosts if host.name == name)
    return [process.pid for process in host.processes() if "train" in process.cmdline()]


@pytest.mark.parametrize("engine", ["mpi", "horovod"])
def test_a_killed_rank_ends_this_start_and_the_next_one_finishes(
    slurm: Slurm, start: Callable[..., Training], undisturbed: str, engine: str
) -> None:
    training = start(engine=engine)
    for pid in ranks_on(slurm, "n2"):
        subprocess.run(["kill", "-KILL", str(pid)], check=True)
    finishes(slurm, training, undisturbed)
    assert "n2: task 1: Killed" in training.job.output
    assert "is requeued (1 of at most 10), after a fault, since its newest checkpoint is of this" in training.job.output
    assert training.record()["launch"]["restarts"] == training.job.restarts == 1


def test_a_crashed_node_is_replaced_before_slurm_has_missed_it(
    slurm: Slurm, start: Callable[..., Training], undisturbed: str
) -> None:
    """Its connections are closed, so that the others' ranks fail at once."""
    training = start(options=())
    lost = training.job.nodes[1]
    slurm.cluster.kill(lost)
    training.job.wait_for("PENDING", LIMIT_S)
    finishes(slurm, training, undisturbed)
    assert "after a fault" in training.job.output
    assert lost not in training.job.nodes


def test_a_node_lost_before_the_first_step_is_replaced(
    slurm: Slurm, start: Callable[..., Training], undisturbed: str, config: Path
) -> None:
    training = submit(slurm, config, nodes=NODES, tasks=1, env={"HPCTRAIN_ENGINE": "mpi"})
    training.job.wait_for_output("start 1", LIMIT_S)
    lost = training.job.nodes[1]
    slurm.cluster.kill(lost)
    finishes(slurm, training, undisturbed)
    assert lost not in training.job.nodes


def test_a_lost_node_is_replaced(slurm: Slurm, start: Callable[..., Training], undisturbed: str) -> None:
    training = start(options=())
    lost = training.job.nodes[1]
    slurm.kill_node(lost)
    training.job.wait_for("PENDING", NODE_TIMEOUT_S + 60)
    assert slurm.node_states()[lost].startswith("down")
    finishes(slurm, training, undisturbed)
    assert training.job.restarts == 1
    assert lost not in training.job.nodes
    assert lost not in {row["host"] for row in training.record()["ranks"]}
    slurm.boot_node(lost)
    slurm.await_nodes("idle", [lost])
    assert slurm.srun([f"--nodelist={lost}", "hostname"]) == f"{lost}\n"


def test_a_cable_out_for_five_seconds_is_waited_for(
    slurm: Slurm, start: Callable[..., Training], undisturbed: str
) -> None:
    training = start()
    slurm.cluster.cut("n2")
    time.sleep(5)
    slurm.cluster.mend("n2")
    finishes(slurm, training, undisturbed)
    assert training.job.restarts == 0


def test_a_cable_out_for_good_loses_the_node(slurm: Slurm, start: Callable[..., Training], undisturbed: str) -> None:
    training = start(options=())
    lost = training.job.nodes[1]
    slurm.cluster.cut(lost)
    training.job.wait_for("PENDING", NODE_TIMEOUT_S + 60)
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    assert lost not in training.job.nodes
    # Cut off, the node has not heard of the job's end.
    slurm.cluster.mend(lost)
    slurm.await_nodes("idle", [lost])
    finishes(slurm, training, undisturbed)


def test_daemons_and_drains_do_not_touch_the_job(
    slurm: Slurm, start: Callable[..., Training], undisturbed: str
) -> None:
    training = start()
    slurm.signal_daemon("n2", "slurmd", "KILL")
    slurm.scontrol(["update", "nodename=n1", "state=drain", "reason=test"])
    slurm.stop_controller()
    slurm.start_controller()
    training.wait_for_step(12)
    slurm.start_slurmd("n2")
    finishes(slurm, training, undisturbed)
    assert training.job.restarts == 0
    slurm.await_nodes("drained", ["n1"])


def test_requeued_by_the_administrator(slurm: Slurm, start: Callable[..., Training], undisturbed: str) -> None:
    training = start()
    training.job.requeue()
    finishes(slurm, training, undisturbed)
    assert training.job.restarts == 1


def test_a_warning_leads_to_a_checkpoint_and_a_requeue(
    slurm: Slurm, start: Callable[..., Training], undisturbed: str
) -> None:
    training = start()
    training.job.signal("USR1", batch=True)
    finishes(slurm, training, undisturbed)
    assert training.job.restarts == 1
    launch = training.record()["launch"]
    assert (launch["restarts"], launch["preemptions"]) == (1, 1)


def test_where_a_requeue_is_forbidden_the_job_ends_with_its_own_status(
    slurm: Slurm, start: Callable[..., Training]
) -> None:
    training = start(options=("--no-requeue",))
    training.job.signal("TERM", batch=True)
    assert (training.job.wait(60), training.job.exit_code) == ("FAILED", PREEMPTED), training.job.output
    assert "--no-requeue" in training.job.output
    assert not slurm.strangers()


def test_cancelled_a_run_goes_on_from_a_checkpoint_that_is_whole(
    slurm: Slurm, start: Callable[..., Training], undisturbed: str
) -> None:
    """scancel: SIGTERM, and SIGKILL after KillWait. Then the newest checkpoint rots."""
    training = start()
    training.wait_for_checkpoint(10)
    training.job.cancel()
    assert training.job.wait(60) == "CANCELLED", training.job.output
    assert not slurm.strangers()
    newest = max((training.run / "checkpoints").glob("step-*"))
    largest = max(newest.iterdir(), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    training.job.requeue()
    finishes(slurm, training, undisturbed)
    assert str(newest) in training.job.output


def test_the_second_of_two_jobs_on_one_run_directory_is_refused(slurm: Slurm, start: Callable[..., Training]) -> None:
    training = start("train.max_steps=5000")
    command = f"srun python -m hpctrain train {training.run}/config.yaml --run-dir {training.run}"
    second = slurm.sbatch(["--nodes=1", "--wrap", command])
    assert (second.wait(LIMIT_S), second.exit_code) == ("FAILED", 2), second.output
    assert str(training.run) in second.output
    assert training.job.state == "RUNNING"


def test_a_full_disk_ends_the_job_and_what_was_saved_before_counts(
    slurm: Slurm, config: Path, undisturbed: str
) -> None:
    """On one node, whose folder of runs is a file system of 4 MB: room for the log and one checkpoint.

    With that one it is started again, and once more fails.
    """
    runs = slurm.shared / "small-disk"
    runs.mkdir()
    first = slurm.cluster.hosts[0]
    first.run(["mount", "-t", "tmpfs", "-o", "size=4m", "small", str(runs)])
    env = {"HPCTRAIN_ENGINE": "mpi", "HPCTRAIN_RUNS": str(runs)}
    training = submit(slurm, config, nodes=1, tasks=NODES, options=("--nodelist=n1",), env=env)
    assert (training.job.wait(LIMIT_S), training.job.exit_code) == ("FAILED", 1), training.job.output
    assert training.job.output.count("No space left on device") >= 2
    assert "is not started again: it failed (exit status 1) before it had written a checkpoint" in training.job.output
    assert not slurm.strangers()
    first.run(["mount", "-o", "remount,size=100m", str(runs)])
    training.job.requeue()
    assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
    record = json.loads(first.run(["cat", str(runs / training.run.name / "record.json")]).stdout)
    assert record["parameters_sha256"] == undisturbed
    assert record["launch"]["restarts"] == 2
