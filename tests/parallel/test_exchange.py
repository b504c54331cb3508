"""The gradient exchange on real ranks: every engine trains the same replicas, and `ordered` the same bits."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.needs import needs
from tests.parallel.launch import run_ranks

MODULES = {"horovod": ("horovod",), "mpi": ("mpi4py",), "torch": ()}
# horovodrun takes MPI where it was built with it; its Gloo controller is another ring.
JOBS = [("horovod", "horovodrun"), ("horovod", "horovodrun-gloo"), ("mpi", "mpirun"), ("torch", "torchrun")]

pytestmark = pytest.mark.timeout(120)


@functools.cache
def train(engine: str, launcher: str, num_ranks: int) -> list[Any]:
    args = ["--engine", engine]
    return run_ranks(engine, num_ranks, "tests/parallel/exchange.py", args, timeout_s=60, launcher=launcher)


@pytest.fixture(params=JOBS, ids=lambda job: job[1])
def job(request: pytest.FixtureRequest) -> tuple[str, str]:
    needs(*MODULES[request.param[0]])
    return request.param


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("reduction", ["engine", "ordered"])
class TestTraining:
    def test_replicas_stay_equal(self, job: tuple[str, str], num_ranks: int, reduction: str) -> None:
        ranks = train(*job, num_ranks)
        assert len({found[reduction]["bits"] for found in ranks}) == 1

    def test_the_mean_is_that_of_one_batch(self, job: tuple[str, str], num_ranks: int, reduction: str) -> None:
        for found in train(*job, num_ranks):
            assert found[reduction]["to_one_batch"] < 1e-6
            assert found[reduction]["accumulated_to_one_batch"] < 1e-6

    def test_buckets_start_early(self, job: tuple[str, str], num_ranks: int, reduction: str) -> None:
        assert all(early > 1 for found in train(*job, num_ranks) for early in found[reduction]["early"])

    def test_an_overflow_on_one_rank_is_everyones(self, job: tuple[str, str], num_ranks: int, reduction: str) -> None:
        for found in train(*job, num_ranks):
            assert found["overflow"][reduction] == [2.0**16, 2.0**15, 2.0**15]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_ordered_gives_the_same_bits_on_every_engine(num_ranks: int) -> None:
    needs("horovod", "mpi4py")
    bits = {launcher: train(engine, launcher, num_ranks)[0]["ordered"]["bits"] for engine, launcher in JOBS}
    assert len(set(bits.values())) == 1, bits


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_changed_replica_is_named(job: tuple[str, str], num_ranks: int) -> None:
    for found in train(*job, num_ranks):
        # Of two ranks neither is the majority.
        named = r"rank 1 (" if num_ranks == 4 else "rank"
        assert named in found["divergence"], found["divergence"]
        assert "first in '0.weight'" in found["divergence"]
