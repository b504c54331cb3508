"""Loaders by name: what is chosen, why, and what is said when it cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.config.schema import DataConfig
from hpctrain.data import loaders
from hpctrain.data.types import Request
from hpctrain.errors import UserError
from hpctrain.topology.probe import Probe
from tests.unit.pictures import picture_set

CPU = torch.device("cpu")


@pytest.fixture
def without_dali(monkeypatch: Any) -> None:
    """As on a machine where DALI is not installed."""
    monkeypatch.setitem(__import__("sys").modules, "nvidia.dali", None)


def make(folder: Path, **options: Any) -> Any:
    config = DataConfig(image_size=16, **options)
    return loaders.make_loader(config, picture_set(folder, 4), seed=1, device=CPU, batch_size=4, threads=1)


@pytest.mark.usefixtures("without_dali")
def test_auto_falls_back_to_torch_and_says_why() -> None:
    name, reason = loaders.choose("auto")
    assert name == "torch"
    assert "nvidia.dali cannot be imported" in reason
    assert "pip install nvidia-dali-cuda1" in reason


@pytest.mark.usefixtures("without_dali")
def test_dali_where_it_is_missing_is_an_error_with_the_right_package(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.loader=dali does not work here: .*pip install nvidia-dali-cuda1[23]0"):
        make(tmp_path, loader="dali")


@pytest.mark.parametrize(("cuda", "package"), [(None, "130"), ("13.0", "130"), ("12.8", "120"), ("14.1", "130")])
def test_the_package_is_that_of_torchs_cuda(monkeypatch: Any, cuda: str | None, package: str) -> None:
    from hpctrain.data.dali import package_name

    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert package_name() == f"nvidia-dali-cuda{package}"


def test_a_loader_asked_for_by_name_is_taken() -> None:
    assert loaders.choose("torch") == ("torch", "asked for")
    assert loaders.choose("synthetic") == ("synthetic", "asked for")


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(UserError, match="data.loader=ffcv is unknown: it is one of dali, torch, synthetic, or auto"):
        loaders.choose("ffcv")


def test_gpu_decoding_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    for ok, name in ((True, "dali"), (False, "torch")):
        monkeypatch.setattr(loaders, "probe", lambda name, ok=ok: Probe(name, ok))
        with pytest.raises(UserError, match=f"data.decode=gpu needs DALI and a GPU, this run has {name} on cpu: set"):
            make(tmp_path, loader="auto", decode="gpu")


@pytest.mark.parametrize("name", sorted(loaders.LOADERS))
def test_every_loader_answers_a_probe_and_keeps_the_contract(tmp_path: Path, name: str) -> None:
    found = loaders.probe(name)
    assert isinstance(found, Probe)
    assert found.name == name
    if not found.ok:
        pytest.skip(found.reason)
    loader = make(tmp_path, loader=name)
    assert loader.name == name
    assert loader.corrupt == []
    request = Request(np.array([3, 1, 2, 2]), 0, 3, "train")
    (batch,) = loader.load([request])
    assert batch.images.shape == (4, 3, 16, 16)
    assert batch.labels.tolist() == [0, 1, 2, 2]
    assert batch.request is request
    loader.close()
