"""What the faults strike: a training on two of four nodes by the shipped script, with a checkpoint written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from hpctrain.metrics.layout import PREFLIGHT_FILE
from tests.cluster.slurm import Slurm
from tests.cluster.training import (
    LIMIT_S,
    Training,
    assert_each_sample_once,
    digits_config,
    record_of,
    submit,
    train_alone,
)
from tests.needs import needs

#: one more than an epoch has
STEPS, BATCH, NODES = 24, 32, 2
#: of the cables while a fault is awaited: a step takes a quarter of a second, in which the cores do little
SLOW = "40mbit"
FAST = "1gbit"


@pytest.fixture(scope="module", autouse=True)
def _modules() -> None:
    needs("sklearn", "nvidia.dali", "mpi4py", "horovod")


@pytest.fixture(scope="module")
def _nodes(_slurm_possible: None) -> Iterator[Slurm]:
    with Slurm(num_nodes=4, tasks_per_node=2, rate=FAST, accounting=True) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def config(_nodes: Slurm) -> Path:
    return digits_config(_nodes, STEPS, BATCH)


@pytest.fixture(scope="module")
def undisturbed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the parameters after all steps."""
    run = train_alone(config, tmp_path_factory.mktemp("alone") / "run", NODES)
    digest: str = record_of(run)["parameters_sha256"]
    return digest


def shape(slurm: Slurm, rate: str) -> None:
    for host in slurm.cluster.hosts:
        if host.alive:
            slurm.cluster.shape(host.name, rate)


@pytest.fixture
def begin(slurm: Slurm, config: Path) -> Callable[..., Training]:
    """Submit on n1 and n2, or where told."""
    shape(slurm, FAST)

    def submitted(
        *overrides: str,
        options: tuple[str, ...] = ("--nodelist=n[1-2]",),
        engine: str = "mpi",
        env: Mapping[str, str] | None = None,
    ) -> Training:
        env = {"HPCTRAIN_ENGINE": engine, **(env or {})}
        return submit(slurm, config, *overrides, nodes=NODES, tasks=1, options=options, env=env)

    return submitted


@pytest.fixture
def start(slurm: Slurm, begin: Callable[..., Training]) -> Callable[..., Training]:
    """The same, and wait until the checkpoint of step 5 is there; from the preflight on cables are slow."""

    def started(*overrides: str, **how: object) -> Training:
        training = begin(*overrides, **how)
        training.job.wait_until((training.run / PREFLIGHT_FILE).exists, LIMIT_S, "leave its preflight's findings")
        shape(slurm, SLOW)
        training.wait_for_checkpoint(5)
        return training

    return started


@pytest.fixture
def finishes(slurm: Slurm, undisturbed: str) -> Callable[[Training], None]:
    """Wait for the end, which is that of the run to which nothing happened; no process is left on any node."""

    def finished(training: Training) -> None:
        shape(slurm, FAST)
        assert training.job.wait(LIMIT_S) == "COMPLETED", training.job.output
        assert training.record()["parameters_sha256"] == undisturbed
        assert [line["step"] for line in training.steps()] == list(range(1, STEPS + 1))
        assert_each_sample_once(training.run)
        assert not slurm.strangers()

    return finished
