"""The Slurm of these tests: jobs run on all nodes, launchers find their ranks, and machines fail and come back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.cluster import leftovers
from tests.cluster.host import HostError
from tests.cluster.processes import PATIENCE_S, ROOT, end_owner, running, until
from tests.cluster.slurm import Slurm
from tests.cluster.slurm_job import Job
from tests.needs import needs

ELEMENTS = 200_000
PAIR = ["--nodes=2", "--nodelist=n[1-2]"]
ACROSS = [sys.executable, "-m", "tests.cluster.across"]

pytestmark = pytest.mark.timeout(5 * PATIENCE_S)


def script(slurm: Slurm, name: str, *lines: str) -> str:
    """A batch script where all nodes see it."""
    path = slurm.shared / name
    path.write_text("\n".join(("#!/bin/bash", "set -euo pipefail", *lines, "")))
    return str(path)


def await_both(job: Job) -> None:
    """Until the step has begun on two nodes: a fault before that is one of the launch."""
    job.wait_until(lambda: job.output.count("begun") == 2, 60, "begin on two nodes")


def results(folder: Path) -> dict[int, dict[str, object]]:
    return {int(path.stem): json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_jobs_run_on_all_nodes(slurm: Slurm) -> None:
    job = slurm.sbatch(["--nodes=4", "--ntasks-per-node=2", "--wrap", "srun hostname; echo $WORDS"], {"WORDS": "a  b"})
    assert job.wait(60) == "COMPLETED", job.output
    assert sorted(job.output.split()[:8]) == ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]
    assert job.output.splitlines()[-1] == "a b"
    assert job.nodes == ["n1", "n2", "n3", "n4"]
    failing = slurm.sbatch(["--wrap", "exit 75"])
    assert (failing.wait(60), failing.exit_code) == ("FAILED", 75)
    assert not slurm.strangers()


def test_what_the_commands_say(slurm: Slurm) -> None:
    job = slurm.sbatch(["--nodes=4", "--exclusive", "--wrap", "sleep 600"])
    waiting = slurm.sbatch(["--nodes=1", "--wrap", "true"])
    job.wait_for("RUNNING", 30)
    waiting.wait_until(lambda: waiting.facts()["Reason"] != "None", 30, "be considered")
    pending, running = slurm.squeue()
    assert pending in (f"{waiting.id} PENDING  {reason}" for reason in ("Resources", "Priority"))
    assert running == f"{job.id} RUNNING n[1-4] None"
    assert set(slurm.node_states().values()) == {"allocated"}
    job.cancel()
    assert job.wait(30) == "CANCELLED"
    assert waiting.wait(60) == "COMPLETED"
    assert slurm.squeue() == []
    told = [{"JobID": name, "State": "COMPLETED"} for name in (waiting.id, f"{waiting.id}.batch")]
    assert until(lambda: waiting.sacct("JobID", "State") == told), waiting.sacct("JobID", "State")
    with pytest.raises(HostError, match="Invalid job id"):
        slurm.scontrol(["show", "job", "4711"])


def test_srun_starts_ranks_of_the_environment(slurm: Slurm) -> None:
    needs("mpi4py")
    before = [host.traffic() for host in slurm.cluster.hosts]
    folder = slurm.shared / "srun"
    folder.mkdir()
    launch = ["--nodes=4", "--ntasks-per-node=2", "--mpi=pmix", "--kill-on-bad-exit=1", *ACROSS, "mpi", str(ELEMENTS)]
    slurm.srun(launch, {"HPCTRAIN_TEST_RESULTS": str(folder)}, timeout_s=160)
    traffic = [host.traffic().since(old) for host, old in zip(slurm.cluster.hosts, before, strict=True)]
    assert results(folder) == {
        rank: {"host": f"n{rank // 2 + 1}", "num_nodes": 4, "local_size": 2, "sum": 36.0} for rank in range(8)
    }
    # Some algorithm sends the buffer of 4-byte numbers once and a half at least through every card.
    assert all(passed.sent > 4 * ELEMENTS for passed in traffic), traffic
    assert not slurm.strangers()


def test_mpirun_over_ssh(slurm: Slurm) -> None:
    """In an allocation, whose launcher it would take by itself: engines/test_launchers.py."""
    needs("mpi4py")
    folder = slurm.shared / "mpirun-over-ssh"
    folder.mkdir()
    command = " ".join([*ACROSS, "mpi", "1000"])
    start = f"mpirun --prtemca plm ssh --bind-to none -x HPCTRAIN_TEST_RESULTS {command}"
    job = slurm.sbatch(
        ["--nodes=2", "--nodelist=n[1-2]", "--ntasks-per-node=2", script(slurm, f"{folder.name}.sh", start)],
        {"HPCTRAIN_TEST_RESULTS": str(folder)},
    )
    assert job.wait(120) == "COMPLETED", job.output
    assert {(rank, row["host"], row["sum"]) for rank, row in results(folder).items()} == {
        (0, "n1", 10.0),
        (1, "n1", 10.0),
        (2, "n2", 10.0),
        (3, "n2", 10.0),
    }
    assert not slurm.strangers()


def test_ssh_between_nodes(slurm: Slurm) -> None:
    first = slurm.cluster.hosts[0]
    done = first.run(["ssh", "n3", "hostname; echo $OMPI_ALLOW_RUN_AS_ROOT $PMIX_MCA_psec"], env=slurm.env)
    assert done.stdout == "n3\n1 native\n"
    assert not slurm.strangers()


def test_requeue(slurm: Slurm) -> None:
    lines = ["echo run ${SLURM_RESTART_COUNT:-first}", "[[ ${SLURM_RESTART_COUNT:-} ]] || srun sleep 600"]
    job = slurm.sbatch(["--nodes=2", script(slurm, "requeue.sh", *lines)])
    job.wait_for_output("run first", 30)
    job.requeue()
    assert job.wait(90) == "COMPLETED", job.output
    assert job.restarts == 1
    assert [line for line in job.output.splitlines() if line.startswith("run")] == ["run first", "run 1"]
    told = {(job.id, "REQUEUED"), (job.id, "COMPLETED")}
    assert until(lambda: told <= {(row["JobID"], row["State"]) for row in job.sacct("JobID", "State")})
    assert not slurm.strangers()


def test_drain_and_resume(slurm: Slurm) -> None:
    slurm.scontrol(["update", "nodename=n2", "state=drain", "reason=test"])
    job = slurm.sbatch(["--nodelist=n2", "--wrap", "hostname"])
    slurm.await_nodes("drained", ["n2"])
    job.wait_until(lambda: "Node" in job.facts()["Reason"], 30, "wait for its node")
    slurm.scontrol(["update", "nodename=n2", "state=resume"])
    assert job.wait(60) == "COMPLETED"
    assert job.output == "n2\n"


def test_a_short_cut_of_the_cable_is_survived(slurm: Slurm) -> None:
    job = slurm.sbatch([*PAIR, script(slurm, "cut.sh", "srun bash -c 'echo begun; sleep 8; hostname'")])
    await_both(job)
    slurm.cluster.cut("n2")
    time.sleep(4)
    slurm.cluster.mend("n2")
    assert job.wait(60) == "COMPLETED", job.output
    assert sorted(job.output.split()[-2:]) == ["n1", "n2"]


def test_daemons_restart_below_a_running_job(slurm: Slurm) -> None:
    job = slurm.sbatch([*PAIR, script(slurm, "restart.sh", "srun bash -c 'echo begun; sleep 12; hostname'")])
    queued = slurm.sbatch([f"--dependency=afterok:{job.id}", "--wrap", "true"])
    await_both(job)
    slurm.stop_controller()
    slurm.signal_daemon("n2", "slurmd", "KILL")
    assert slurm.call(["squeue"], check=False).returncode != 0
    slurm.start_slurmd("n2")
    slurm.start_controller()
    assert job.wait(90) == "COMPLETED", job.output
    assert job.restarts == 0
    assert queued.wait(60) == "COMPLETED"


def test_gpus_by_gres() -> None:
    with Slurm(num_nodes=2, gpus=2) as slurm:
        asked = ["--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"]
        printed = slurm.srun([*asked, "bash", "-c", "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"])
        assert sorted(printed.splitlines()) == ["n1 0", "n1 1", "n2 0", "n2 1"]
        refused = slurm.call(["srun", "--gpus-per-node=3", "true"], check=False)
        assert "Requested node configuration is not available" in refused.stderr


@pytest.mark.usefixtures("own_folder")
def test_nothing_outlives_a_killed_owner_of_slurm() -> None:
    program = (
        "from tests.cluster.slurm import Slurm; import time; s = Slurm(2, accounting=True); "
        "s.sbatch(['--nodes=2', '--wrap', 'srun sleep 5006']); print(s.shared, flush=True); time.sleep(600)"
    )
    shared = end_owner(program, signal.SIGKILL, lambda: len(running("sleep", "5006")) == 2)

    def gone() -> bool:
        holders = subprocess.run(["grep", "-lzaF", shared, *Path("/proc").glob("[0-9]*/cmdline")], capture_output=True)
        return not running("sleep", "5006") and not holders.stdout

    assert until(gone)
    assert shared not in Path("/proc/mounts").read_text()
    assert Path(shared) in leftovers()
    subprocess.run([sys.executable, "-m", "tests.cluster", "down"], cwd=ROOT, capture_output=True, check=True)
    assert not Path(shared).exists()


def test_the_shell_with_slurm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster", "up", "2", "--slurm"],
        cwd=ROOT,
        input="sinfo --noheader --format=%D,%T; srun -N2 hostname | sort; exit 4\n",
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE_S,
    )
    assert (done.returncode, done.stdout.splitlines()[1:]) == (4, ["2,idle", "n1", "n2"]), done.stderr
