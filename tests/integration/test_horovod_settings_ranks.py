"""Horovod's knobs reach a Horovod that runs, and its record and the screen say what they do to the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.commands import Ranks, train
from tests.unit.small_runs import write_recipe

pytestmark = pytest.mark.timeout(300)


def test_a_run_with_fusion_is_marked_as_not_reproducible(tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "small.yaml", train={"max_steps": 3, "batch_per_worker": 4})
    sets = ("comm.horovod.fusion_threshold_mib=2", "comm.horovod.cycle_time_ms=0.5")
    done = train(Ranks("horovod", "horovodrun", 2), config, tmp_path / "run", *sets)
    told = "Horovod's fusion up to 2 MiB follows timing: this run is not reproducible"
    assert done.output.count(told) == 1, done.output
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert told in record["engine_choice"]
    assert record["engine"]["versions"]["horovod_fusion_threshold"] == "2097152 (not reproducible)"
    environment = record["provenance"]["environment"]
    assert (environment["HOROVOD_FUSION_THRESHOLD"], environment["HOROVOD_CYCLE_TIME"]) == ("2097152", "0.5")
