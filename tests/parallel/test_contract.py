"""Every engine keeps the communicator's contract on 1, 2, 3 and 4 ranks, under every launcher it is meant for."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator

import pytest

from tests.needs import needs
from tests.parallel.contract import CHECKS
from tests.parallel.launch import Run, launch

JOBS = [
    ("serial", "plain", 1),
    *[("horovod", launcher, size) for launcher in ("mpirun", "horovodrun-gloo") for size in (1, 2, 3, 4)],
    *[("mpi", "mpirun", size) for size in (1, 2, 3, 4)],
    *[("torch", "torchrun", size) for size in (1, 2, 3, 4)],
    ("horovod", "horovodrun", 2),
    ("torch", "mpirun", 2),
    ("torch", "horovodrun-gloo", 2),
    ("horovod", "plain", 1),
    ("mpi", "plain", 1),
    ("torch", "plain", 1),
]
_MODULES = {"horovod": ("horovod",), "mpi": ("mpi4py",), "torch": (), "serial": ()}


@functools.cache
def run_contract(engine: str, launcher: str, size: int) -> Run:
    """One start of the job serves all its checks."""
    command = [sys.executable, "tests/parallel/contract.py", "--engine", engine]
    return launch(launcher, size, command, timeout_s=100)


_SPLIT = """
import os, torch
from hpctrain.comm import registry
from hpctrain.errors import UserError
from hpctrain.topology.ranks import detect
from tests.parallel.launch import report
comm = registry.create("horovod", detect(os.environ), torch.device("cpu"), timeout_s=30)
try:
    comm.split([0])
except UserError as error:
    report(str(error))
comm.close()
"""


@pytest.mark.timeout(120)
def test_horovod_that_was_told_to_make_no_groups_says_so() -> None:
    needs("horovod")
    env = {"HOROVOD_DYNAMIC_PROCESS_SETS": "0"}
    run = launch("mpirun", 2, [sys.executable, "-c", _SPLIT], timeout_s=100, env=env)
    text = (
        "Horovod makes no groups of its ranks: "
        "Set HOROVOD_DYNAMIC_PROCESS_SETS=1 to allow adding process sets after Horovod initialization."
    )
    assert run.results == {0: text, 1: text}, run.output[-4000:]


def _cases() -> Iterator[object]:
    for engine, launcher, size in JOBS:
        for check in CHECKS:
            yield pytest.param(engine, launcher, size, check, id=f"{engine}-{launcher}-{size}-{check[6:]}")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("engine", ["horovod", "mpi", "serial"])
def test_an_engine_that_comes_up_alone_is_refused_with_both_numbers(engine: str) -> None:
    """As under srun without PMIx, where each rank is a world of its own: torchrun speaks to neither MPI nor Horovod."""
    needs(*_MODULES[engine])
    run = launch("torchrun", 2, [sys.executable, "tests/parallel/contract.py", "--engine", engine], timeout_s=100)
    assert run.returncode != 0
    text = f"torchrun says rank 1 of 2 but the {engine} engine came up as rank 0 of 1: start it with "
    assert text in run.output or text.replace("rank 1 of", "rank 0 of") in run.output, run.output[-4000:]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("engine", "launcher", "size", "check"), list(_cases()))
def test_contract(engine: str, launcher: str, size: int, check: str) -> None:
    needs(*_MODULES[engine], *(["horovod"] if launcher.startswith("horovodrun") else []))
    run = run_contract(engine, launcher, size)
    failures = {rank: found["failures"] for rank, found in run.results.items()}
    for rank, found in sorted(failures.items()):
        assert check not in found, f"rank {rank}: {found[check]}"
    assert not any(failures.values()), f"not run after a failure of {[list(found) for found in failures.values()]}"
    assert (run.returncode, len(run.results), run.survivors) == (0, size, 0), run.output[-6000:]
