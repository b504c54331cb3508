"""The data benchmark verifies, interleaves and records every sample; its variants leave nothing running."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.bench import data as bench
from hpctrain.config.schema import DataConfig
from hpctrain.errors import MachineError, UserError
from tests.needs import needs
from tests.unit.pictures import picture_set

needs("nvidia.dali")


def task_of(folder: Path, **options: Any) -> bench.Task:
    config = DataConfig(image_size=16, **{key: options.pop(key) for key in ("crop", "channels") if key in options})
    settings: dict[str, Any] = {"seed": 1, "batch_size": 4, "threads": 1, "batches": 5, **options}
    return bench.Task(config, picture_set(folder, 12), **settings)


def test_record_has_all_samples_and_ratios_by_round(tmp_path: Path) -> None:
    told: list[int] = []
    record = bench.measure(task_of(tmp_path), 3, told.append, {"command": "test"})
    assert told == [0, 1, 2, 3]
    assert set(record["variants"]) == {"dali", "bare_dali", "torch"}
    for variant in record["variants"].values():
        assert len(variant["samples"]) == 3
        assert variant["images_per_s"]["p5"] <= variant["images_per_s"]["median"] <= variant["images_per_s"]["p95"]
    pairs = zip(record["variants"]["dali"]["samples"], record["variants"]["torch"]["samples"], strict=True)
    assert record["ratios"]["dali_over_torch"]["rounds"] == [one / other for one, other in pairs]
    assert record["provenance"] == {"command": "test"}
    assert "times torch's DataLoader" in bench.sentence(record)


def test_blocks_go_on_through_the_epochs(tmp_path: Path) -> None:
    task = task_of(tmp_path)
    first, second = task.requests(0), task.requests(1)
    assert [request.epoch for request in first + second] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("batches", [1, 2, 5])
def test_bare_dali_runs_as_many_batches_as_are_taken(tmp_path: Path, batches: int) -> None:
    variant = bench.BareDali(task_of(tmp_path, batches=batches))
    for _ in range(3):
        variant.run(task_of(tmp_path, batches=batches).requests(0))


def test_loaders_that_disagree_are_not_timed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("hpctrain.data.pillow_loader.decode", lambda *arguments: torch.zeros(16, 16, 3).numpy())
    with pytest.raises(MachineError, match="pictures of DALI and Pillow differ by"):
        bench.measure(task_of(tmp_path), 1, lambda number: None, {})


def test_a_set_smaller_than_a_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"12 samples, fewer than a batch of 32: set train\.batch_per_worker lower"):
        bench.measure(task_of(tmp_path, batch_size=32), 1, lambda number: None, {})


def test_centre_windows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"bench data compares random windows.*: set data\.crop=random"):
        bench.measure(task_of(tmp_path, crop="centre"), 1, lambda number: None, {})


def test_grey_pictures_are_measured_too(tmp_path: Path) -> None:
    record = bench.measure(task_of(tmp_path, channels=1), 1, lambda number: None, {})
    assert record["verified"]["mean_difference_of_255"] < 1.0
