"""Open MPI is told to take rings between hosts and to wait politely, unless the user said otherwise."""

from __future__ import annotations

import os

import pytest

from hpctrain.comm.open_mpi import BETWEEN_HOSTS, EVERYWHERE, RULES, tune
from hpctrain.topology.ranks import Topology

VARIABLES = EVERYWHERE | BETWEEN_HOSTS


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        # Set and removed, so that what the test sets is undone.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)


def test_between_hosts_the_variables_are_set_and_the_rules_are_there() -> None:
    tune(Topology(world_size=4, num_nodes=2))
    assert {variable: os.environ[variable] for variable in VARIABLES} == VARIABLES
    assert RULES.read_text().startswith("3 # collectives")


def test_on_one_host_waiting_threads_yield_and_the_rest_is_open_mpis_own() -> None:
    tune(Topology(world_size=4, num_nodes=1))
    assert {variable: os.environ[variable] for variable in VARIABLES if variable in os.environ} == EVERYWHERE


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "put")
    tune(Topology(world_size=4, num_nodes=4))
    assert {os.environ[name] for name in VARIABLES} == {"put"}
