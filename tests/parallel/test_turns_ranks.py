"""A signal to one rank stops all ranks of a real job before the same step; a rank that hangs then is still named."""

from __future__ import annotations

import sys

import pytest

from tests.needs import needs
from tests.parallel.launch import launch, run_ranks

pytestmark = pytest.mark.timeout(200)


@pytest.mark.parametrize(
    ("engine", "world_size", "rank"),
    [("mpi", 2, 1), ("mpi", 4, 2), ("torch", 3, 0), ("torch", 4, 3), ("horovod", 2, 0)],
)
def test_all_ranks_stop_before_the_same_step(engine: str, world_size: int, rank: int) -> None:
    needs(*{"horovod": ("horovod",), "mpi": ("mpi4py",)}.get(engine, ()))
    arguments = ["--engine", engine, "--rank", str(rank)]
    rows = run_ranks(engine, world_size, "tests.parallel.turns", arguments, timeout_s=150)
    assert len({row["steps"] for row in rows}) == 1, rows
    assert rows[0]["steps"] >= 20
    assert {row["reason"].partition(" (")[0] for row in rows} == {f"SIGUSR1 on rank {rank}"}


def test_a_rank_that_hangs_while_the_others_stop_is_named() -> None:
    needs("mpi4py")
    command = [sys.executable, "-m", "tests.parallel.turns", "--engine", "mpi", "--rank", "0", "--hang"]
    run = launch("mpirun", 2, command, timeout_s=150)
    assert not run.timed_out, run.output[-4000:]
    assert run.returncode not in (0, 75)
    assert run.survivors == 0
    assert "rank 1 (host" in run.output, run.output[-4000:]
    assert "step 20, phase data" in run.output
