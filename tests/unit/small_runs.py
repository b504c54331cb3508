"""Runs of a second inside the test process: small recipes, one rank or several as threads, and what they leave."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from hpctrain.cli import main
from hpctrain.comm.agree import on_rank_zero
from hpctrain.comm.base import Communicator
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.comm.turns import Turns
from hpctrain.config.plan import Plan, make_plan
from hpctrain.config.schema import Config
from hpctrain.data.types import Batch, Loader, Request
from hpctrain.launch.continuing import TrainCommand
from hpctrain.launch.preempt import Requests
from hpctrain.metrics.layout import list_checkpoints, step_of
from hpctrain.topology.ranks import Topology
from hpctrain.train import build, summary
from hpctrain.train.build import build_parts
from hpctrain.train.main import train_command
from hpctrain.train.parts import Parts
from hpctrain.train.run import train
from hpctrain.train.rundir import RunDirectory
from hpctrain.train.session import Session, never
from tests.unit.fake_group import FakeCommunicator, run_group

#: what differs between two equal runs: clocks and memory
TIMES = ("images_per_s", "phases_s", "rss_bytes", "cpu_cores", "seconds", "stragglers")

_BASE: dict[str, dict[str, Any]] = {
    "model": {"name": "dense", "neurons": 8},
    "data": {
        "loader": "synthetic",
        "image_size": 4,
        "channels": 1,
        "num_classes": 7,
        "synthetic_samples": 100,
        "threads": 1,
    },
    "train": {"epochs": 4, "batch_per_worker": 8, "device": "cpu"},
    "schedule": {"kind": "constant", "lr": 0.05},
    "checkpoint": {"every_steps": 10, "keep": 100},
    "log": {"every_steps": 1, "tensorboard": False},
}


def values(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """The small recipe as it would stand in YAML, with ``sections`` laid over it."""
    merged: dict[str, Any] = {name: {**_BASE.get(name, {}), **keys} for name, keys in (_BASE | sections).items()}
    if sections.get("model", {}).get("name", "dense") != "dense":
        merged["model"] = dict(sections["model"])
    return merged


def write_recipe(path: Path, **sections: Mapping[str, Any]) -> Path:
    """The same as a file."""
    path.write_text(json.dumps(values(**sections)))  # JSON is YAML
    return path


def recipe(**sections: Mapping[str, Any]) -> Config:
    """Four epochs of twelve steps on 100 synthetic pictures, unless ``sections`` say otherwise."""
    return Config.model_validate(values(**sections))


def alone() -> SerialCommunicator:
    return SerialCommunicator(Topology(), torch.device("cpu"))


def session_of(comm: Communicator) -> Session:
    """A session that nobody watches over."""
    watch: Any = SimpleNamespace(beat=lambda step, phase: None)
    return Session(comm, watch, unasked(comm), cores=1, engine_reason="a test")


def unasked(comm: Communicator) -> Turns:
    """Turns that nobody asks to stop."""
    board: Any = None  # never looked at: no thread is started
    return Turns(board, comm.topology, never)


def plan_of(config: Config, world_size: int = 1, val_samples: int = 4) -> Plan:
    """The plan of a recipe on synthetic data."""
    classes = config.data.num_classes
    assert classes is not None
    samples = config.data.synthetic_samples
    return make_plan(
        config,
        world_size=world_size,
        num_nodes=1,
        train_samples=samples,
        val_samples=val_samples,
        num_classes=classes,
    )


def parts_of(config: Config, comm: Communicator | None = None) -> Parts:
    """Model, optimizer and exchange of a recipe."""
    comm = comm or alone()
    return build_parts(config, plan_of(config, comm.world_size), session_of(comm))


def without_picture() -> AbstractContextManager[object]:
    """Draw no learning curve, which would take more time than the small run itself."""
    return mock.patch.object(summary, "draw_learning_curve")


def run_here(config: Config, folder: Path, resume: str = "auto") -> dict[str, Any]:
    """Train on one rank as the command does, but for the picture; returns the record."""
    with without_picture():
        train_command(config, TrainCommand(Path("test")), resume=resume, run_dir=folder)
    return record_of(folder)


def run_on(world_size: int, config: Config, folder: Path, resume: str = "auto") -> dict[str, Any]:
    """The same on ranks that are threads; no dropout then, since threads share torch's generator."""

    def rank(comm: FakeCommunicator) -> None:
        run = RunDirectory(folder)
        assert on_rank_zero(comm, run.open)
        try:
            train(config, session_of(comm), run, resume, TrainCommand(Path("test")), Requests())
        finally:
            run.close()

    with without_picture():
        run_group(world_size, rank)
    return record_of(folder)


@dataclass(frozen=True)
class Finished:
    """How a command ended, and what it wrote to each stream."""

    code: int
    out: str
    err: str


def command(*argv: str | Path) -> Finished:
    """`hpctrain` with these arguments, in this process; an exception that it does not handle passes through."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["hpctrain", *map(str, argv)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as leave:
            code = int(leave.code or 0)
    return Finished(code, out.getvalue(), err.getvalue())


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


def lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a log without what depends on the clock."""
    rows = [json.loads(row) for row in path.read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def saved_steps(folder: Path) -> list[int]:
    """Of the checkpoints that a run has kept, in order."""
    return [step_of(path) for path in reversed(list_checkpoints(folder / "checkpoints"))]


@dataclass
class Taken:
    """The training requests whose batches were taken, by whichever rank."""

    requests: list[Request] = field(default_factory=list)

    def ids(self, epoch: int) -> list[int]:
        """Samples of an epoch that counted, sorted."""
        mine = (request for request in self.requests if request.epoch == epoch)
        return sorted(int(sample) for request in mine for sample in request.sample_ids[: request.valid])


class _Recording:
    def __init__(self, inner: Loader, taken: Taken) -> None:
        self.name, self.corrupt, self.close = inner.name, inner.corrupt, inner.close
        self._inner, self._taken = inner, taken

    def load(self, requests: Iterable[Request]) -> Iterator[Batch]:
        for batch in self._inner.load(requests):
            if batch.request.mode == "train":
                self._taken.requests.append(batch.request)
            yield batch


def record_requests(monkeypatch: pytest.MonkeyPatch) -> Taken:
    """From now on, note what the runs of this process take from their loaders."""
    taken, make = Taken(), build.make_loader

    def recording(*args: Any, **options: Any) -> Loader:
        return _Recording(make(*args, **options), taken)

    monkeypatch.setattr(build, "make_loader", recording)
    return taken
