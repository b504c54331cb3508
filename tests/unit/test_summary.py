"""The end of a run: a record that validates, a picture that decodes, and neither before the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hpctrain.errors import MachineError, UserError
from hpctrain.launch.continuing import TrainCommand
from hpctrain.metrics.record import parameters_sha256, read_record
from hpctrain.train import loop, main, summary
from hpctrain.train.build import Feeds
from hpctrain.train.checkpoint import load_checkpoint
from hpctrain.train.main import train_command
from hpctrain.train.session import Session, open_session
from hpctrain.train.state import Evaluation
from tests.unit.image_folders import image_folder
from tests.unit.small_runs import lines_of, recipe, run_here, run_on


def test_a_run_leaves_what_a_report_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train_command(recipe(train={"max_steps": 30}), TrainCommand(Path("small")), resume="auto", run_dir=tmp_path)
    record = read_record(tmp_path / "record.json")
    assert (record.plan.world_size, record.plan.batch_global, record.plan.steps_per_epoch) == (1, 8, 12)
    assert record.throughput.images_per_s.median
    assert (record.accuracy.seen, record.data.real, record.data.loader) == (4, False, "synthetic")
    assert (record.engine.name, record.wire.bytes_per_step, len(record.ranks)) == ("serial", 0, 1)
    last = load_checkpoint(tmp_path / "checkpoints/step-000030").tensors["model"]
    assert record.parameters_sha256 == parameters_sha256(last.items())
    with Image.open(tmp_path / "learning-curve.png") as picture:
        picture.load()
    said = capsys.readouterr().out
    for file in ("record.json", "learning-curve.png"):
        assert str(tmp_path / file) in said


def test_no_rank_waits_for_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a busy file system, the first import of matplotlib may take longer than a rank may be late."""
    happened: list[str] = []

    @contextmanager
    def session(*args: Any) -> Iterator[Session]:
        with open_session(*args) as opened:
            yield opened
        happened.append("closed")

    monkeypatch.setattr(main, "open_session", session)
    monkeypatch.setattr(summary, "draw_learning_curve", lambda *args: happened.append("drawn"))
    train_command(recipe(train={"max_steps": 2}), TrainCommand(Path("small")), resume="auto", run_dir=tmp_path)
    assert happened == ["closed", "drawn"]


def test_a_run_whose_picture_cannot_be_drawn_has_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any) -> None:
        raise MachineError("cannot write learning-curve.png: Disk quota exceeded")

    monkeypatch.setattr(summary, "draw_learning_curve", refuse)
    train_command(recipe(train={"max_steps": 2}), TrainCommand(Path("small")), resume="auto", run_dir=tmp_path)
    said = capsys.readouterr().out
    assert "no learning curve was drawn: cannot write learning-curve.png: Disk quota exceeded\n" in said
    assert str(tmp_path / "record.json") in said and (tmp_path / "record.json").exists()


def test_rank_0_alone_asks_where_the_run_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("hpctrain.metrics.provenance._git_state", lambda: asked.append("git"))
    record = run_on(3, recipe(train={"batch_per_worker": 2, "max_steps": 2}), tmp_path)
    assert asked == ["git"]
    assert record["provenance"]["hosts"] == ["host0", "host1", "host2"]


@pytest.mark.parametrize(("compression", "dtype", "width"), [("none", "float32", 4), ("fp16", "float16", 2)])
def test_what_went_over_the_wire(tmp_path: Path, compression: str, dtype: str, width: int) -> None:
    options = {"train": {"batch_per_worker": 4, "max_steps": 6}, "gradients": {"compression": compression}}
    record = run_on(2, recipe(**options, log={"every_steps": 3}), tmp_path)
    gradients_bytes = width * (16 * 8 + 8 + 8 * 7 + 7)
    sent_bytes = record["wire"].pop("bytes_per_step")
    assert gradients_bytes <= sent_bytes < gradients_bytes + 128, "but for padding"
    assert "the engine's own all-reduce" in record["wire"].pop("reduction_choice")
    nothing = dict.fromkeys(("overflow", "underflow", "subnormal", "nonfinite", "skipped_steps"), 0)
    assert record["wire"] == {"dtype": dtype, "reduction": "engine", **nothing}
    assert ("underflow" in lines_of(tmp_path / "steps.jsonl")[-1]) == (compression == "fp16")
    assert [(row["rank"], row["host"]) for row in record["ranks"]] == [(0, "host0"), (1, "host1")]


def test_a_run_without_evaluations_has_no_accuracy(tmp_path: Path) -> None:
    run_here(recipe(train={"max_steps": 3, "eval_every_epochs": None}), tmp_path)
    accuracy = read_record(tmp_path / "record.json").accuracy
    assert (accuracy.top1, accuracy.top5, accuracy.seen) == (None, None, 0)


def test_the_record_is_there_only_after_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor while a run that had ended goes on for longer."""
    seen = []
    step = loop.train_step

    def watched(*args: Any) -> torch.Tensor:
        seen.append((tmp_path / "record.json").exists())
        return step(*args)

    monkeypatch.setattr(loop, "train_step", watched)
    for steps in (5, 9):
        run_here(recipe(train={"max_steps": steps}), tmp_path)
        assert (tmp_path / "record.json").exists()
    assert seen == [False] * 9


def ended_by_target(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(Feeds, "evaluate", lambda self: Evaluation(top1=0.9, top5=1.0, loss=0.1, seen=4))
    return {"target_accuracy": 0.8}


@pytest.mark.parametrize("end", ["steps", "target"])
def test_a_run_that_has_ended_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], end: str
) -> None:
    config = recipe(train={"max_steps": 30} if end == "steps" else ended_by_target(monkeypatch))
    first = run_here(config, tmp_path)
    capsys.readouterr()
    assert run_here(config, tmp_path) == first
    reason = "finished" if end == "steps" else "target accuracy 0.8 reached"
    assert f"this run has ended ({reason}), see {tmp_path / 'record.json'}" in capsys.readouterr().out


def test_a_run_killed_before_its_record_gets_it_on_resume(tmp_path: Path) -> None:
    config = recipe(train={"max_steps": 30})
    first = run_here(config, tmp_path)
    (tmp_path / "record.json").unlink()
    again = run_here(config, tmp_path)
    for key in ("parameters_sha256", "accuracy", "steps", "config_hash"):
        assert again[key] == first[key]
    assert again["throughput"]["images_per_s"]["median"] is None, "this process took no step"


def spoil(path: Path, *, cut: bool) -> None:
    """Cut a picture short, or empty its tables so that its size is still told and its pixels are not."""
    data = path.read_bytes()
    tables = data.index(b"\xff\xc4") + 4, data.rindex(b"\xff\xda")
    path.write_bytes(data[:-40] if cut else data[: tables[0]] + bytes(tables[1] - tables[0]) + data[tables[1] :])


@pytest.mark.parametrize("world_size", [1, 3])
def test_corrupt_pictures_are_counted_and_named_once(
    tmp_path: Path, world_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """However many ranks and epochs have met them, over a resume too; those of the validation part as well."""
    root = image_folder(tmp_path / "set", {"train": 8, "val": 3})
    spoilt = [root / "train/ant/ant0.jpg", root / "train/bee/bee1.jpg", root / "val/cat/cat2.jpg"]
    for number, path in enumerate(spoilt):
        spoil(path, cut=number == 0)
    data = {"loader": "torch", "path": str(root), "num_classes": 3, "image_size": 8, "max_corrupt_share": 0.4}
    run = tmp_path / "run"
    for epochs in (3, 6):
        train = {"batch_per_worker": 6 // world_size, "epochs": epochs}
        config = recipe(data=data, train=train)
        record = run_here(config, run) if world_size == 1 else run_on(world_size, config, run)
        assert record["data"]["corrupt_skipped"] == 3
        assert sorted(line.split(":")[0] for line in record["data"]["corrupt"]) == [str(path) for path in spoilt]
    said = capsys.readouterr().out
    assert all(said.count(f"{path}:") == 1 for path in spoilt)
    assert record["steps"] == 24 and record["accuracy"]["seen"] == 8
    assert lines_of(run / "steps.jsonl")[-1]["corrupt_skipped"] == 3


def test_too_many_corrupt_pictures_over_all_ranks_end_the_job(tmp_path: Path) -> None:
    """Though no rank by itself has met more than the share that is allowed."""
    root = image_folder(tmp_path / "set", {"train": 8, "val": 1})
    for number in range(8):
        name = ("ant", "bee", "cat")[number % 3]
        spoil(root / "train" / name / f"{name}{number}.jpg", cut=True)
    data = {"loader": "torch", "path": str(root), "num_classes": 3, "image_size": 8, "max_corrupt_share": 0.15}
    message = (
        r"[5-8] of 27 samples \([0-9.]+%\) cannot be decoded, more than data\.max_corrupt_share = 15\.00% allows, the "
        r"last one being .*\.jpg: .*: run `hpctrain data verify .*/set` to list them all"
    )
    with pytest.raises(UserError, match=message):
        run_on(4, recipe(data=data, train={"batch_per_worker": 2, "epochs": 1}), tmp_path / "run")
