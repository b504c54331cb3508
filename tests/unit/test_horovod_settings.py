"""Horovod's knobs from the configuration into its environment; every refusal; what a run tells of them."""

from __future__ import annotations

import os
import re

import pytest
import torch

from hpctrain.comm import horovod_settings as settings
from hpctrain.config.comm import HorovodConfig
from hpctrain.config.load import load_config
from hpctrain.errors import UserError
from tests.unit.small_runs import command

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, _ in settings.KEYS.values():
        monkeypatch.setenv(variable, "")  # so that what the code under test sets is taken back
        monkeypatch.delenv(variable)


def test_every_key_of_the_section_has_its_variable() -> None:
    assert list(HorovodConfig.model_fields) == list(settings.KEYS)


def test_what_is_not_given_is_left_alone() -> None:
    settings.ask_for("torch", CPU, HorovodConfig().model_dump())
    assert not {variable for variable, _ in settings.KEYS.values()} & set(os.environ)


def test_values_in_the_units_of_horovod() -> None:
    wanted = HorovodConfig(fusion_threshold_mib=0.5, cycle_time_ms=2.5, hierarchical_allreduce=True)
    settings.ask_for("horovod", GPU, wanted.model_dump())
    assert os.environ["HOROVOD_FUSION_THRESHOLD"] == "524288"
    assert os.environ["HOROVOD_CYCLE_TIME"] == "2.5"
    assert os.environ["HOROVOD_HIERARCHICAL_ALLREDUCE"] == "1"
    settings.ask_for("horovod", GPU, wanted.model_dump())  # as a launcher that was told the same would have it


@pytest.mark.parametrize("key", list(settings.KEYS))
def test_another_engine_is_refused(key: str) -> None:
    text = f"comm.horovod.{key} is a setting of Horovod's, but the engine of this job is torch: leave it out, or set "
    with pytest.raises(UserError, match=re.escape(text + "comm.engine=horovod")):
        settings.ask_for("torch", GPU, {key: 1})


def test_auto_that_takes_another_engine_is_refused_before_it_starts() -> None:
    done = command("train", "configs/quickstart.yaml", "--set", "comm.horovod.cycle_time_ms=5")
    assert done.code == 2
    assert done.err == (
        "hpctrain: comm.horovod.cycle_time_ms is a setting of Horovod's, but the engine of this job is serial: leave "
        "it out, or set comm.engine=horovod\n"
    )


def test_another_engine_by_name_is_refused_by_the_configuration() -> None:
    sets = ["model.name=dense", "comm.engine=mpi", "comm.horovod.hierarchical_allreduce=false"]
    text = "horovod.hierarchical_allreduce is a setting of Horovod's, but engine is mpi: leave it out"
    with pytest.raises(UserError, match=text):
        load_config(None, sets)


@pytest.mark.parametrize("key", ["fusion_threshold_mib", "cycle_time_ms"])
def test_less_than_nothing_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"comm\.horovod\.{key} is -1 .* but must be "):
        load_config(None, ["model.name=dense", f"comm.horovod.{key}=-1"])


def test_hierarchical_all_reduce_without_a_gpu_is_refused() -> None:
    text = "is done by NCCL, but this job's buffers are not on a GPU: leave it out, or set gradients.reduction=grid"
    with pytest.raises(UserError, match=f"comm.horovod.hierarchical_allreduce {text}"):
        settings.ask_for("horovod", CPU, {"hierarchical_allreduce": True})
    settings.ask_for("horovod", CPU, {"hierarchical_allreduce": False})
    assert os.environ["HOROVOD_HIERARCHICAL_ALLREDUCE"] == "0"


def test_a_launcher_that_says_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "67108864")
    text = (
        "comm.horovod.fusion_threshold_mib is 32, which is HOROVOD_FUSION_THRESHOLD=33554432, but the environment "
        "says 67108864: leave one of them out"
    )
    with pytest.raises(UserError, match=text):
        settings.ask_for("horovod", CPU, {"fusion_threshold_mib": 32.0})


def test_hierarchical_all_reduce_over_gloo_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.check_started(over_mpi=False)
    monkeypatch.setenv("HOROVOD_HIERARCHICAL_ALLREDUCE", "1")
    settings.check_started(over_mpi=True)
    with pytest.raises(UserError, match=r"works over MPI only, and here it runs on Gloo: start it with mpirun or .*"):
        settings.check_started(over_mpi=False)


@pytest.mark.parametrize("key", ["cycle_time_ms", "hierarchical_allreduce"])
def test_a_comparison_with_horovod_as_released_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings.require_released()
    variable = settings.KEYS[key][0]
    monkeypatch.setenv(variable, "1")
    text = f"{variable} is set, but Horovod is to run as released: unset it, or leave comm.horovod.{key} out"
    with pytest.raises(UserError, match=text):
        settings.require_released()


def test_fusion_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert settings.remark("horovod") == ""
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", str(3 << 19))
    assert settings.remark("torch") == ""
    assert settings.remark("horovod") == "; Horovod's fusion up to 1.5 MiB follows timing: this run is not reproducible"
