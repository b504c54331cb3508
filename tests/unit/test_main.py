"""The commands `train` and `eval` beyond their loop: run directories, and evaluation on any number of ranks."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpctrain.config.load import load_config
from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.topology.ranks import Topology
from hpctrain.train import main
from hpctrain.train.main import eval_command, evaluate_checkpoint
from hpctrain.train.resume import find_checkpoint
from hpctrain.train.run import check_same_config
from hpctrain.train.session import Session
from hpctrain.train.state import Evaluation
from tests.unit.fake_group import FakeCommunicator, run_group
from tests.unit.image_folders import image_folder
from tests.unit.small_runs import command, recipe, record_of, run_here, run_on, session_of, write_recipe


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three classes, 24 pictures to train on and 33 to judge: a number that no world size but 1 and 3 divides."""
    root = image_folder(tmp_path_factory.mktemp("pictures"), {"train": 8, "val": 11})
    return {"loader": "torch", "path": str(root), "num_classes": 3, "image_size": 8, "channels": 3}


def judged(config: Config, folder: Path, world_size: int) -> Evaluation:
    results = run_group(world_size, lambda comm: evaluate_checkpoint(config, session_of(comm), find_checkpoint(folder)))
    assert len(set(results)) == 1
    return results[0]


@pytest.mark.parametrize("ema_decay", [None, 0.8])
@pytest.mark.parametrize("name", ["dense", "resnet20"])
def test_the_same_figures_on_any_number_of_ranks(
    tmp_path: Path, pictures: dict[str, Any], name: str, ema_decay: float | None
) -> None:
    train = {"batch_per_worker": 4, "max_steps": 20, "epochs": 9, "ema_decay": ema_decay}
    record = run_here(recipe(data=pictures, model={"name": name}, train=train), tmp_path)
    config = load_config(tmp_path / "config.yaml")
    told = record["accuracy"]
    for world_size in (1, 2, 3, 4):
        result = judged(config, tmp_path, world_size)
        assert (result.top1, result.top5, result.seen) == (told["top1"], told["top5"], 33)
        assert result.loss == pytest.approx(told["loss"])
    assert 0 < told["top1"] <= told["top5"] == 1.0


def test_more_ranks_than_a_step_of_training_had_samples_for(tmp_path: Path, pictures: dict[str, Any]) -> None:
    """Evaluation asks for no global batch; nor for as many workers as the run was bound to."""
    train = {"batch_per_worker": 12, "max_steps": 2}
    record = run_on(2, recipe(data=pictures, train=train, parallel={"virtual_workers": 2}), tmp_path)
    config = load_config(tmp_path / "config.yaml")
    for world_size in (1, 4):
        assert judged(config, tmp_path, world_size).top1 == record["accuracy"]["top1"]


def test_ranks_with_different_configurations_do_not_start() -> None:
    def rank(comm: FakeCommunicator) -> str:
        with pytest.raises(UserError) as caught:
            check_same_config(comm, recipe(checkpoint={"every_steps": 10 + comm.rank // 2}))
        return str(caught.value)

    sentence = (
        "the configuration of rank 2 (host2), 3 (host3) is not that of rank 0 (host0): start all ranks with the same "
        "file, as their hosts see it, and the same --set"
    )
    assert run_group(4, rank) == [sentence] * 4
    run_group(4, lambda comm: check_same_config(comm, recipe()))


def test_of_many_ranks_with_another_configuration_the_first_are_named() -> None:
    """A file that one node lacks the newest version of may be that of a thousand ranks."""
    rows = [["n1", "a: 1\n"], *[["n2", "a: 2\n"]] * 10]
    comm: Any = SimpleNamespace(topology=Topology(), all_gather_object=lambda row: rows)
    named = ", ".join(rf"{rank} \(n2\)" for rank in range(1, 9))
    with pytest.raises(UserError, match=rf"of rank {named} and 2 more is not that of rank 0 \(n1\): start all"):
        check_same_config(comm, recipe())


def test_a_run_that_has_ended_is_told_how_to_train_further(tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "small.yaml", train={"max_steps": 2})
    assert command("train", config, "--run-dir", tmp_path / "run").code == 0
    done = command("train", config, "--run-dir", tmp_path / "run")
    assert done.code == 0
    (told,) = (line for line in done.out.splitlines() if "has ended" in line)
    assert told == (
        f"this run has ended (finished), see {tmp_path}/run/record.json; to train further, raise the limit that ended "
        "it (for example train.epochs)"
    )


def test_eval_prints_and_writes_its_figures(tmp_path: Path, pictures: dict[str, Any]) -> None:
    config = write_recipe(tmp_path / "small.yaml", data=pictures, train={"batch_per_worker": 4, "max_steps": 6})
    assert command("train", config, "--run-dir", tmp_path / "run").code == 0
    accuracy = record_of(tmp_path / "run")["accuracy"]
    newest = tmp_path / "run/checkpoints/step-000006"
    for named in (tmp_path / "run", newest):
        done = command("eval", named, "--json", tmp_path / "eval.json")
        assert done.code == 0, done.err
        assert done.out.startswith(f"top-1 {accuracy['top1']:.2%}  top-5 {accuracy['top5']:.2%}  loss ")
        figures = json.loads((tmp_path / "eval.json").read_text())
        assert figures == {**accuracy, "checkpoint": str(newest)}


def evaluate_on_two_ranks(monkeypatch: pytest.MonkeyPatch, *runs: Path, overrides: tuple[str, ...] = ("", "")) -> None:
    """`hpctrain eval` of ``runs``, one a rank, as ranks find them before they have met; each with its own override."""
    this = threading.local()

    @contextmanager
    def open_session(comm: object, device: str) -> Iterator[Session]:
        yield session_of(this.comm)

    def rank(comm: FakeCommunicator) -> None:
        this.comm = comm
        eval_command(runs[comm.rank], [text for text in [overrides[comm.rank]] if text], None)

    monkeypatch.setattr(main, "open_session", open_session)
    run_group(2, rank)


def test_eval_judges_what_rank_0_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run that goes on, the next rank may find a newer checkpoint; a sum over two models says nothing."""
    run_here(recipe(train={"max_steps": 20}), tmp_path)
    judged: list[Path] = []

    def evaluate(config: Config, session: Session, folder: Path) -> Evaluation:
        judged.append(folder)
        return Evaluation(top1=0.5, top5=1.0, loss=0.5, seen=4)

    monkeypatch.setattr(main, "evaluate_checkpoint", evaluate)
    older, newer = (tmp_path / f"checkpoints/step-0000{step}" for step in (10, 20))
    evaluate_on_two_ranks(monkeypatch, older, newer)
    assert judged == [older, older]


def test_eval_with_different_configurations_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(recipe(train={"max_steps": 2}), tmp_path)
    with pytest.raises(UserError, match=r"the configuration of rank 1 \(host1\) is not that of rank 0 \(host0\)"):
        evaluate_on_two_ranks(monkeypatch, tmp_path, tmp_path, overrides=("data.image_size=4", "data.image_size=8"))


def test_eval_within_the_folder_of_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(recipe(train={"max_steps": 2}), tmp_path)
    monkeypatch.chdir(tmp_path / "checkpoints")
    done = command("eval", "step-000002")
    assert done.code == 0, done.err


def test_eval_of_what_is_no_run(tmp_path: Path) -> None:
    done = command("eval", tmp_path)
    assert done.code == 2
    assert done.err == (
        f"hpctrain: {tmp_path} is neither a checkpoint nor a run directory with one; name a checkpoints/step-… folder\n"
    )


def test_eval_with_another_model_is_refused(tmp_path: Path) -> None:
    run_here(recipe(train={"max_steps": 2}), tmp_path)
    done = command("eval", tmp_path, "--set", "model.neurons=9")
    assert done.code == 2
    assert "is of another model" in done.err


def test_runs_lie_below_runs_by_the_name_of_their_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_recipe(tmp_path / "small.yaml", train={"max_steps": 2})
    assert command("train", config).code == 0
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith("small-20")
    assert (run / "record.json").exists()


def test_the_configuration_of_a_run_loads_back(tmp_path: Path) -> None:
    config = recipe(train={"max_steps": 2, "ema_decay": 0.5}, optimizer={"nesterov": True})
    run_here(config, tmp_path)
    assert load_config(tmp_path / "config.yaml") == config


def test_tensorboard_can_be_read(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (10, 20):
        run_here(recipe(train={"max_steps": steps}, log={"tensorboard": True}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 21))
    assert [event.step for event in events.Scalars("val/top1")] == [10, 12, 20]


@pytest.mark.parametrize("compression", ["fp16", "bf16", "fp16_ef"])
def test_a_narrow_run_goes_on_bit_for_bit(tmp_path: Path, compression: str) -> None:
    """Scales and what error feedback owes are in the checkpoint; on another number of ranks the run goes on too."""

    def trained(folder: Path, world_size: int, steps: int) -> str:
        train = {"batch_per_worker": 8 // world_size, "max_steps": steps, "epochs": 4}
        gradients = {"compression": compression, "reduction": "ordered", "bucket_mib": 0.001}
        return run_on(world_size, recipe(train=train, gradients=gradients), folder)["parameters_sha256"]

    # Ranks that are threads share torch's random numbers, so the initial weights are one run's only.
    trained(tmp_path / "start", 2, 2)
    for name in ("whole", "parts", "grown"):
        shutil.copytree(tmp_path / "start", tmp_path / name)
    whole = trained(tmp_path / "whole", 2, 8)
    trained(tmp_path / "parts", 2, 5)
    assert trained(tmp_path / "parts", 2, 8) == whole
    trained(tmp_path / "grown", 4, 8)
