"""20 steps are 10, SIGKILL and 10 more, bit for bit, on every engine; and engines agree with each other.

The run that is compared with has batch norm, Nesterov momentum, a moving average, random windows and flips, and
is killed within an epoch. Its own reduction is `ordered`, so one run without a break serves all engines.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.integration.commands import Job, Ranks, hpctrain, train, train_argv, write_config
from tests.needs import needs
from tests.unit.small_runs import command, lines_of, record_of, saved_steps

pytestmark = pytest.mark.timeout(600)

REFERENCE = Ranks("mpi", "mpirun", 2)
PAIRS = [
    Ranks("horovod", "mpirun", 2),
    Ranks("horovod", "horovodrun-gloo", 2),
    Ranks("mpi", "mpirun", 2),
    Ranks("torch", "torchrun", 2),
]
ALONE = Ranks("serial", "plain", 1)


@pytest.fixture(scope="module")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("nvidia.dali")
    return write_config(
        tmp_path_factory.mktemp("config") / "resume.yaml",
        model={"name": "resnet20"},
        data={"path": str(digits), "loader": "dali", "threads": 1, "image_size": 8, "channels": 1},
        train={"epochs": 50, "batch_per_worker": 16, "ema_decay": 0.9, "label_smoothing": 0.1},
        optimizer={"nesterov": True},
        schedule={"kind": "cosine", "lr": 0.1, "warmup_epochs": 1},
        gradients={"reduction": "ordered", "check_every_steps": 5},
        checkpoint={"every_steps": 10},
        log={"every_steps": 1, "tensorboard": False},
    )


@pytest.fixture(scope="module")
def whole(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 steps without a break on two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(REFERENCE, config, run, "train.max_steps=20")
    return run


def run_and_kill(ranks: Ranks, config: Path, run: Path, *sets: str) -> None:
    """A run killed as soon as the checkpoint of step 10 is there: launcher, ranks and all."""
    tenth = run / "checkpoints/step-000010"
    with Job(ranks, *train_argv(ranks, config, run, *sets)) as job:
        job.wait_until(tenth.exists)
        job.kill()
        assert job.end().returncode != 0
    assert not (run / "record.json").exists()
    for later in set((run / "checkpoints").glob("step-*")) - {tenth}:
        shutil.rmtree(later)  # the kill came late: as if it had not


@pytest.fixture(scope="module")
def killed(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("killed") / "run"
    run_and_kill(PAIRS[1], config, run)
    return run


@pytest.mark.parametrize("ranks", PAIRS, ids=str)
def test_ten_steps_a_kill_and_ten_more(ranks: Ranks, config: Path, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_and_kill(ranks, config, run)
    done = train(ranks, config, run, "train.max_steps=20")
    assert "going on from step 10" in done.output
    assert_same_end(run, whole)
    assert record_of(run)["engine"]["name"] == ranks.engine
    assert record_of(run)["data"]["samples_seen"] == 20 * 32


def assert_same_end(run: Path, whole: Path) -> None:
    assert record_of(run)["parameters_sha256"] == record_of(whole)["parameters_sha256"]
    assert lines_of(run / "steps.jsonl") == lines_of(whole / "steps.jsonl")
    assert lines_of(run / "evals.jsonl") == lines_of(whole / "evals.jsonl")
    last = "checkpoints/step-000020/model.safetensors"
    assert (run / last).read_bytes() == (whole / last).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_ten_steps_a_kill_and_ten_more_on_one_rank(precision: str, config: Path, tmp_path: Path) -> None:
    sets = ("train.batch_per_worker=32", f"train.precision={precision}")
    assert command(*train_argv(ALONE, config, tmp_path / "whole", *sets, "train.max_steps=20")).code == 0
    run_and_kill(ALONE, config, tmp_path / "run", *sets)
    train(ALONE, config, tmp_path / "run", *sets, "train.max_steps=20")
    assert_same_end(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("form", ["batch_per_worker=32", "accumulation=2"])
def test_one_rank_goes_on_where_two_were_killed(form: str, config: Path, killed: Path, tmp_path: Path) -> None:
    run = shutil.copytree(killed, tmp_path / "run")
    argv = train_argv(ALONE, config, run, f"train.{form}", "train.max_steps=44")
    done = command(*argv)
    assert done.code == 0, done.err
    assert "going on from step 10" in done.out
    record = record_of(run)
    assert record["data"]["samples_seen"] == 44 * 32, "the epoch's samples, each once"
    assert record["plan"]["steps_per_epoch"] == 44
    assert lines_of(run / "steps.jsonl")[-1]["epoch"] == 1.0


def test_one_rank_with_another_global_batch_is_refused(config: Path, killed: Path) -> None:
    done = command(*train_argv(ALONE, config, killed))
    assert done.code == 2
    assert done.err == (
        "hpctrain: the checkpoint of step 10 was made with a global batch of 32 on 2 ranks, and 1 ranks would make "
        "it 16; set train.batch_per_worker and train.accumulation so that 1 x batch_per_worker x accumulation = 32\n"
    )
    assert saved_steps(killed) == [10]


def test_eval_gives_the_same_figures_on_one_and_on_three_ranks(whole: Path, tmp_path: Path) -> None:
    """Those of the run itself: 359 pictures, which three ranks cannot share evenly."""
    told = record_of(whole)["accuracy"]
    assert command("eval", whole, "--json", tmp_path / "one.json", "--set", "comm.engine=serial").code == 0
    three = Ranks("torch", "torchrun", 3)
    done = hpctrain(three, "eval", whole, "--json", tmp_path / "three.json", "--set", "comm.engine=torch")
    assert done.returncode == 0, done.output
    assert done.output.count("top-1") == 1
    for file in ("one.json", "three.json"):
        figures = json.loads((tmp_path / file).read_text())
        assert [figures[key] for key in ("top1", "top5", "seen")] == [told["top1"], told["top5"], 359]


@pytest.fixture(scope="module")
def dense(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(
        tmp_path_factory.mktemp("config") / "dense.yaml",
        model={"name": "dense", "hidden_layers": 2, "neurons": 50, "batch_norm": True},
        data={"path": str(digits), "loader": "torch", "threads": 1, "image_size": 8, "channels": 1, "flip": False},
        train={"epochs": 1, "batch_per_worker": 8, "max_steps": 12},
        gradients={"reduction": "ordered", "bucket_mib": 0.01},
        log={"every_steps": 1, "tensorboard": False},
    )


def test_four_ranks_of_each_engine_agree(dense: Path, tmp_path: Path) -> None:
    """Which also shows that `horovodrun -np 4` works on fewer cores."""
    ends = {}
    for engine, launcher in (("horovod", "horovodrun"), ("mpi", "mpirun"), ("torch", "torchrun")):
        run = tmp_path / engine
        train(Ranks(engine, launcher, 4), dense, run)
        record = record_of(run)
        assert record["plan"]["world_size"] == 4
        del record["accuracy"]["loss"]  # summed in the engine's own order
        ends[engine] = record["parameters_sha256"], record["accuracy"]
    assert ends["horovod"] == ends["mpi"] == ends["torch"]
