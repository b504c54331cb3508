"""When these tests run: where the machine can bring up hosts, but in CI only when HPCTRAIN_CLUSTER=1 asks for them.

Elsewhere they are skipped with the reason; when asked for, a machine that cannot is a failure.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import Cluster, obstacle

SWITCH = "HPCTRAIN_CLUSTER"


@pytest.fixture(autouse=True, scope="session")
def _possible() -> None:
    asked_for = os.environ.get(SWITCH) == "1"
    if os.environ.get("CI") == "true" and not asked_for:
        pytest.skip(f"the cluster's tests run in CI only with {SWITCH}=1")
    if reason := obstacle():
        if asked_for:
            pytest.fail(f"{SWITCH}=1, but {reason}", pytrace=False)
        pytest.skip(f"no hosts can be brought up: {reason}")


@pytest.fixture(scope="module")
def cluster(_possible: None) -> Iterator[Cluster]:
    """Four hosts with cables of 1 Gbit/s, for the tests of one file."""
    with Cluster(4, rate="1gbit") as hosts:
        yield hosts
