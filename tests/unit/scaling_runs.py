"""Folders of finished runs as training leaves them, for reports on scaling: made up, at any size and rate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.config.load import config_hash, dump_config
from hpctrain.config.schema import Config
from hpctrain.metrics.record import write_record
from tests.unit.test_record import RECORD


def write_run(
    folder: Path,
    workers: int,
    rate: float,
    *,
    nodes: int = 1,
    batch: int = 32,
    accumulation: int = 1,
    config: Mapping[str, Mapping[str, Any]] | None = None,
    record: Mapping[str, Mapping[str, Any]] | None = None,
) -> Path:
    """A run at ``rate`` images/s; ``config`` and ``record`` are laid over their sections. Returns ``folder``."""
    folder.mkdir(parents=True)
    sections: dict[str, Any] = {"model": {"name": "resnet20"}, "data": {"path": "digits"}}
    sections["train"] = {"batch_per_worker": batch, "accumulation": accumulation, "device": "cpu"}
    for name, keys in (config or {}).items():
        sections[name] = {**sections.get(name, {}), **keys}
    asked = Config.model_validate(sections)
    (folder / "config.yaml").write_text(dump_config(asked))
    values = copy.deepcopy(RECORD)
    values["config_hash"] = config_hash(asked)
    values["plan"] |= {
        "world_size": workers, "workers": workers, "nodes": nodes, "batch_per_worker": batch,
        "batch_global": workers * batch * accumulation,
    }  # fmt: skip
    values["throughput"]["images_per_s"] = {"median": rate, "p5": rate * 0.9, "p95": rate * 1.1}
    values["provenance"] = {"cpu": {"model": "a CPU"}, "versions": {"torch": "2.13.0+cpu"}, "steal_share": 0.0}
    for name, keys in (record or {}).items():
        values[name] = {**values.get(name, {}), **keys}
    write_record(folder / "record.json", values)
    return folder
