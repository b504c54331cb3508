"""When these tests run: where the machine can bring up hosts. Elsewhere they are skipped with the reason; in CI a
machine that cannot is a failure. What they need installs ``tests/cluster/install.sh``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster, obstacle
from tests.cluster.slurm import Slurm, slurm_obstacle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: workers that run side by side take one after the other in this order."""
    items.sort(key=lambda item: item.path.parent.name != "faults")


def _demand(reason: str | None) -> None:
    if reason is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"no hosts can be brought up, and in CI they must: {reason}", pytrace=False)
    pytest.skip(f"no hosts can be brought up: {reason}")


@pytest.fixture(autouse=True, scope="session")
def _possible() -> None:
    _demand(obstacle())


@pytest.fixture(scope="module")
def cluster(_possible: None) -> Iterator[Cluster]:
    """Four hosts with cables of 1 Gbit/s, for the tests of one file."""
    with Cluster(4, rate="1gbit") as hosts:
        yield hosts


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clusters have their folders where those of no other test are, or of anybody else."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.fixture(scope="session")
def _slurm_possible(_possible: None) -> None:
    _demand(slurm_obstacle())


@pytest.fixture(scope="module")
def _nodes(_slurm_possible: None) -> Iterator[Slurm]:
    with Slurm(num_nodes=4, tasks_per_node=2, rate="1gbit", accounting=True) as slurm:
        yield slurm


@pytest.fixture
def slurm(_nodes: Slurm) -> Iterator[Slurm]:
    """Four nodes for two tasks each, without jobs; the same for the tests of a file, put in order after each."""
    yield _nodes
    _nodes.restore()
