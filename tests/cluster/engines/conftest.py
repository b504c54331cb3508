"""What every engine trains on four nodes, and the same on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm
from tests.cluster.training import digits_config, train_alone
from tests.needs import needs

NODES, STEPS = 4, 12


@pytest.fixture(scope="module", autouse=True)
def _modules() -> None:
    needs("sklearn", "nvidia.dali", "mpi4py", "horovod")


@pytest.fixture(scope="module")
def config(_nodes: Slurm) -> Path:
    return digits_config(_nodes, STEPS)


@pytest.fixture(scope="module")
def alone(config: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With as many ranks as the nodes have where a node has ``TASKS`` of the file."""
    return train_alone(config, tmp_path_factory.mktemp("alone") / "run", NODES * request.module.TASKS)
