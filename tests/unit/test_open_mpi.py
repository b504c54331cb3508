"""Open MPI is told to take rings between hosts, unless the user said otherwise."""

from __future__ import annotations

import os

import pytest

from hpctrain.comm.open_mpi import RULES, VARIABLES, tune
from hpctrain.topology.ranks import Topology


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


def test_on_one_host_nothing_is_set() -> None:
    tune(Topology(world_size=4, num_nodes=1))
    assert not VARIABLES.keys() & os.environ.keys()


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(VARIABLES))
    monkeypatch.setenv(name, "put")
    tune(Topology(world_size=4, num_nodes=4))
    assert os.environ[name] == "put"
