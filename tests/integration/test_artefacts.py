"""A run of two ranks as it is found afterwards: every file that a report, a person or a next run needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from hpctrain.config.load import config_hash, load_config
from hpctrain.metrics.jsonfiles import read_log_if_any
from hpctrain.metrics.record import read_record
from hpctrain.train.checkpoint import load_checkpoint
from tests.integration.commands import Ranks, train, write_config
from tests.needs import needs
from tests.parallel.launch import ROOT

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("nvidia.dali", "tensorboard")
    return write_config(
        tmp_path_factory.mktemp("config") / "artefacts.yaml",
        model={"name": "resnet20"},
        data={"path": str(digits), "loader": "dali", "threads": 1, "image_size": 8, "channels": 1, "flip": False},
        train={"epochs": 2, "batch_per_worker": 32, "channels_last": True},
        schedule={"kind": "cosine", "lr": 0.1},
        log={"every_steps": 4},
    )


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    train(Ranks("horovod", "horovodrun", 2), config, run)
    return run


def test_every_file_is_there_and_no_other(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert names == {
        ".lock",
        "checkpoints",
        "config.yaml",
        "evals.jsonl",
        "launches.jsonl",
        "learning-curve.png",
        "record.json",
        "steps.jsonl",
        "tensorboard",
    }


def test_the_record(run: Path) -> None:
    record = read_record(run / "record.json")
    assert record.config_hash == config_hash(load_config(run / "config.yaml"))
    assert (record.plan.world_size, record.plan.batch_global, record.plan.steps_per_epoch) == (2, 64, 22)
    assert (record.data.loader, record.data.real, record.data.samples_seen) == ("dali", True, 2 * 22 * 64)
    assert record.accuracy.seen == 359
    assert record.accuracy.top1 is not None and record.accuracy.top1 > 0.2
    assert record.engine.name == "horovod" and record.engine.version
    assert [row.rank for row in record.ranks] == [0, 1]
    rates = record.throughput.images_per_s
    assert rates.p5 is not None and rates.median is not None and rates.p95 is not None
    assert 0 < rates.p5 <= rates.median <= rates.p95
    assert record.wire.bytes_per_step >= 4 * 269_000, "the parameters of ResNet-20"


def test_the_logs(run: Path) -> None:
    steps, evals = read_log_if_any(run / "steps.jsonl"), read_log_if_any(run / "evals.jsonl")
    assert [line["step"] for line in steps] == [4, 8, 12, 16, 20, 22, 24, 28, 32, 36, 40, 44]
    assert [(line["step"], line["epoch"], line["seen"]) for line in evals] == [(22, 1.0, 359), (44, 2.0, 359)]
    assert set(steps[0]["phases_s"]) == {"data", "forward", "backward", "exposed_comm", "optimizer"}
    for line in steps:
        assert {"step", "epoch", "loss", "lr", "images_per_s", "phases_s"} <= line.keys()
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_the_picture_decodes(run: Path) -> None:
    with Image.open(run / "learning-curve.png") as picture:
        picture.load()
        assert min(picture.size) > 600


def test_tensorboard_reads_the_scalars(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 12
    assert len(events.Scalars("val/top1")) == 2


def test_checkpoints_are_those_of_the_epochs(run: Path) -> None:
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000022", "step-000044"]
    last = load_checkpoint(run / "checkpoints/step-000044")
    assert last.numbers["progress"]["epoch"] == 2
    assert set(last.tensors) == {"model", "optimizer"}


def test_the_doctor_finds_nothing_wrong_where_the_tests_run() -> None:
    needs("horovod", "mpi4py", "nvidia.dali")
    command = [sys.executable, "-m", "hpctrain", "doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert all(answer["ok"] for answer in (*report["engines"], *report["loaders"])), report
