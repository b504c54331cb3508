"""`hpctrain doctor --job` on nodes of a real Slurm: a node behind a slow cable is named, and what no node may hide."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.needs import needs

# Eight processes start python and torch; where other work has the cores that takes minutes.
pytestmark = pytest.mark.timeout(600)
LIMIT_S = 280.0


def preflight(slurm: Slurm, run: Path, *words: str, tasks: int = 1) -> subprocess.CompletedProcess[str]:
    config = slurm.shared / "net.yaml"
    config.write_text("model: {name: dense}\ncomm: {engine: torch, timeout_s: 200}\ntrain: {device: cpu}\n")
    step = ["--mpi=none", "--nodes=4", f"--ntasks-per-node={tasks}", "--cpus-per-task=2", "--kill-on-bad-exit=1"]
    argv = ["python", "-m", "hpctrain", "doctor", "--job", str(config), "--run-dir", str(run), *words]
    return slurm.call(["srun", *step, *argv], timeout_s=LIMIT_S, check=False)


def test_four_sound_nodes(slurm: Slurm) -> None:
    run = slurm.shared / "sound"
    done = preflight(slurm, run, tasks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 ranks on 4 hosts, engine torch" in done.stdout and "preflight took" in done.stdout
    found = json.loads((run / "preflight.json").read_text())
    assert [(place["node"], place["card"]) for place in found["places"]] == [
        (f"n{node}", "eth0") for node in (1, 2, 3, 4) for _ in range(2)
    ]
    assert {len(pace["sums"]) for pace in found["paces"]} == {3}


def test_a_node_behind_a_slow_cable_is_named(slurm: Slurm) -> None:
    slurm.cluster.shape("n3", "40mbit")
    try:
        done = preflight(slurm, slurm.shared / "slow", "--set", "launch.slow_node=stop")
    finally:
        slurm.cluster.shape("n3", "1gbit")
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"n3 is slow \(.*times the median .* for a sum with n2 and n4\)", done.stderr), done.stderr
    assert re.search(r"submit again with --exclude=\S*n3", done.stderr)
    assert not slurm.strangers()


def test_a_run_directory_that_each_node_has_for_itself_is_refused(slurm: Slurm) -> None:
    done = preflight(slurm, Path("/tmp/of-each-node"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the run directory /tmp/of-each-node is not shared: what rank 0 wrote on host n1" in done.stderr
    assert "on n2, n3, n4" in done.stderr and done.stderr.count("is not shared") == 1


def test_ranks_that_are_worlds_of_their_own_are_refused(slurm: Slurm) -> None:
    """What Open MPI 5 makes of srun without PMIx."""
    needs("mpi4py")
    done = preflight(slurm, slurm.shared / "alone", "--set", "comm.engine=mpi")
    assert done.returncode != 0
    assert re.search(r"says rank \d of 4 but the mpi engine came up as rank 0 of 1: .*--mpi=pmix", done.stderr)
