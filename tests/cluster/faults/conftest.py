"""What the faults strike: a training on two of four nodes by the shipped script, with a checkpoint written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.training import LIMIT_S, Training, digits_config, record_of, submit, train_alone
from tests.needs import needs

STEPS, NODES = 24, 2
#: of the cables: a step takes a quarter of a second, in which the cores do little, so that faults find it at work
RATE = "40mbit"


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


@pytest.fixture
def finishes(slurm: Slurm, undisturbed: str) -> Callable[[Training], None]:
    """Wait for the end, which is that of the run to which nothing happened; no process is left on any node."""

    def finished(training: Training) -> None:
        assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
        assert training.record()["parameters_sha256"] == undisturbed
        assert [line["step"] for line in training.steps()] == list(range(1, STEPS + 1))
        assert not slurm.strangers()

    return finished
