"""Going on from a checkpoint: bit for bit, with exactly the unseen samples, or not at all and with the reason."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.config.schema import Config
from hpctrain.errors import UserError
from hpctrain.train import resume as module
from hpctrain.train.checkpoint import load_checkpoint
from hpctrain.train.resume import choose_checkpoint, find_checkpoint
from tests.unit.fake_group import FakeCommunicator, run_group
from tests.unit.image_folders import image_folder
from tests.unit.small_runs import (
    Taken,
    alone,
    lines_of,
    recipe,
    record_of,
    record_requests,
    run_here,
    run_on,
    saved_steps,
)

#: Each keeps something that a resume could lose. An epoch has 12 steps, so that step 10 lies within one.
FLAVOURS: dict[str, dict[str, Any]] = {
    "momentum": {"optimizer": {"nesterov": True}},
    "adam": {"optimizer": {"name": "adam"}, "schedule": {"kind": "cosine", "lr": 0.01, "warmup_epochs": 1}},
    "rmsprop": {"optimizer": {"name": "rmsprop"}, "schedule": {"kind": "constant", "lr": 0.001}},
    "dropout": {"model": {"dropout": 0.5, "hidden_layers": 2, "batch_norm": True}},
    "ema": {"train": {"ema_decay": 0.9}},
    "bf16": {"train": {"precision": "bf16", "label_smoothing": 0.1}, "model": {"dropout": 0.2}},
    "fp16": {"train": {"precision": "fp16"}},
    "accumulation": {"train": {"accumulation": 2, "batch_per_worker": 4}, "model": {"dropout": 0.2}},
    "padding": {"train": {"last_batch": "pad"}},
    "channels last": {
        "model": {"name": "resnet20", "zero_gamma": True},
        "train": {"channels_last": True, "batch_per_worker": 8},
        "data": {"image_size": 8, "channels": 3, "flip": True},
    },
}


def until(step: int, config: Config) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"max_steps": step})})


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_ten_steps_and_ten_more_are_twenty(tmp_path: Path, flavour: str) -> None:
    config = recipe(**FLAVOURS[flavour])
    whole = run_here(until(20, config), tmp_path / "whole")
    run_here(until(10, config), tmp_path / "parts")
    resumed = run_here(until(20, config), tmp_path / "parts")
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]
    assert resumed["data"]["samples_seen"] == whole["data"]["samples_seen"]
    assert lines_of(tmp_path / "parts" / "steps.jsonl") == lines_of(tmp_path / "whole" / "steps.jsonl")
    last = [load_checkpoint(tmp_path / run / "checkpoints/step-000020") for run in ("whole", "parts")]
    for group, tensors in last[0].tensors.items():
        assert all(torch.equal(tensor, last[1].tensors[group][name]) for name, tensor in tensors.items())
    assert last[0].numbers["loss_scale"] == last[1].numbers["loss_scale"]


@pytest.mark.parametrize("crop", ["random", "centre"])
def test_pictures_are_the_same_after_a_resume(tmp_path: Path, crop: str) -> None:
    """Windows and flips of the second half are those of a run without a break, over the end of an epoch."""
    folder = image_folder(tmp_path / "set", {"train": 8, "val": 1})
    data = {"loader": "torch", "path": str(folder), "num_classes": 3, "image_size": 8, "channels": 3, "crop": crop}
    config = recipe(data=data, train={"batch_per_worker": 4, "epochs": 5}, model={"batch_norm": True})
    whole = run_here(until(20, config), tmp_path / "whole")
    run_here(until(10, config), tmp_path / "parts")
    assert run_here(until(20, config), tmp_path / "parts")["parameters_sha256"] == whole["parameters_sha256"]


def ranks(world_size: int, config: Config, folder: Path) -> dict[str, Any]:
    return run_here(config, folder) if world_size == 1 else run_on(world_size, config, folder)


@pytest.mark.parametrize(
    ("before", "after"),
    [((2, 4, 1), (1, 8, 1)), ((1, 8, 1), (2, 2, 2)), ((4, 2, 1), (1, 4, 2)), ((1, 4, 3), (3, 4, 1))],
    ids=["2x4 to 1x8", "1x8 to 2x2x2", "4x2 to 1x4x2", "1x4x3 to 3x4"],
)
def test_another_number_of_ranks_sees_exactly_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: tuple[int, int, int], after: tuple[int, int, int]
) -> None:
    """Ranks, batch and accumulation change, their product does not."""
    taken = record_requests(monkeypatch)

    def config(shape: tuple[int, int, int], steps: int) -> Config:
        return recipe(train={"batch_per_worker": shape[1], "accumulation": shape[2], "epochs": 2, "max_steps": steps})

    batch = before[0] * before[1] * before[2]
    steps_per_epoch = 100 // batch
    ranks(before[0], config(before, 5), tmp_path)
    first = taken.ids(0)
    assert len(first) == 5 * batch
    ranks(after[0], config(after, 2 * steps_per_epoch), tmp_path)
    assert len(taken.ids(0)) == len(set(taken.ids(0))) == steps_per_epoch * batch
    assert len(taken.ids(1)) == len(set(taken.ids(1))) == steps_per_epoch * batch
    record = record_of(tmp_path)
    assert record["data"]["samples_seen"] == 2 * steps_per_epoch * batch
    resumed = taken.requests.copy()
    taken.requests.clear()
    ranks(before[0], config(before, 2 * steps_per_epoch), tmp_path / "whole")
    for epoch in (0, 1):
        assert taken.ids(epoch) == Taken(resumed).ids(epoch), "those of a run without a break"


def test_each_step_has_the_samples_it_would_have_had(tmp_path: Path) -> None:
    """Without batch norm the loss of each step then agrees between world sizes, but for rounding."""
    one, two = {"batch_per_worker": 8, "max_steps": 20}, {"batch_per_worker": 4, "max_steps": 20}
    # Not synthetic: those pictures depend on the size of a batch.
    folder = image_folder(tmp_path / "set", {"train": 30, "val": 1})
    data = {"loader": "torch", "path": str(folder), "num_classes": 3, "image_size": 8}
    for world_size, train in ((1, one), (2, two)):
        run = tmp_path / f"real{world_size}"
        run_here(recipe(data=data, train={**one, "max_steps": 10}), run)
        ranks(world_size, recipe(data=data, train=train), run)
    first, second = (lines_of(tmp_path / f"real{world_size}" / "steps.jsonl") for world_size in (1, 2))
    assert [line["loss"] for line in second] == pytest.approx([line["loss"] for line in first], rel=1e-4)


def stopped_at_ten(folder: Path, **sections: Any) -> None:
    run_here(until(10, recipe(**sections)), folder)


@pytest.mark.parametrize(
    ("made_with", "resumed_with", "sentence"),
    [
        (
            {},
            {"train": {"batch_per_worker": 16}},
            r"the checkpoint of step 10 was made with a global batch of 8 on 1 ranks, and 1 ranks would make it 16; "
            r"set train\.batch_per_worker and train\.accumulation so that 1 x batch_per_worker x accumulation = 8",
        ),
        (
            {},
            {"seed": 2},
            r"the checkpoint of step 10 has another order of samples \(seed 1 -> 2\); restore these values or start",
        ),
        (
            {},
            {"data": {"synthetic_samples": 104}, "train": {"last_batch": "pad"}},
            r"another order of samples \(train_samples 100 -> 104, last_batch drop -> pad\)",
        ),
        (
            {},
            {"model": {"neurons": 9}},
            r"checkpoint of step 10 is of another model \(dense there, dense here; fc\.weight is \[7, 8\] there and "
            r"\[7, 9\] here\); set the model it was made with or start a new run with --run-dir",
        ),
        (
            {},
            {"model": {"name": "resnet20"}},
            r"is of another model \(dense there, resnet20 here; .* is absent there and \[16\] here\)",
        ),
        (
            {},
            {"optimizer": {"name": "adam"}},
            r"The checkpoint's optimizer state does not fit Adam on this model .*: resume with the model and optimizer",
        ),
        (
            {},
            {"train": {"ema_decay": 0.9}},
            r"the checkpoint of step 10 holds no moving average; resume with train\.ema_decay=none",
        ),
    ],
)
def test_what_would_be_another_run_is_refused(
    tmp_path: Path, made_with: dict[str, Any], resumed_with: dict[str, Any], sentence: str
) -> None:
    stopped_at_ten(tmp_path, **made_with)
    before = (tmp_path / "steps.jsonl").read_bytes(), (tmp_path / "config.yaml").read_bytes()
    seed = resumed_with.get("seed", 1)
    config = recipe(**{name: keys for name, keys in resumed_with.items() if name != "seed"})
    with pytest.raises(UserError, match=sentence):
        run_here(config.model_copy(update={"seed": seed}), tmp_path)
    assert saved_steps(tmp_path) == [10]
    assert before == ((tmp_path / "steps.jsonl").read_bytes(), (tmp_path / "config.yaml").read_bytes())


def test_the_average_of_a_checkpoint_may_be_left(tmp_path: Path) -> None:
    stopped_at_ten(tmp_path, train={"ema_decay": 0.9})
    assert run_here(until(20, recipe()), tmp_path)["steps"] == 20


def test_never_wants_an_unused_run_directory(tmp_path: Path) -> None:
    stopped_at_ten(tmp_path)
    with pytest.raises(UserError, match=r"already holds a run; continue it with --resume auto or give another --run"):
        run_here(recipe(), tmp_path, resume="never")
    assert run_here(until(3, recipe()), tmp_path / "new", resume="never")["steps"] == 3


@pytest.mark.parametrize("form", ["run", "checkpoint"])
def test_a_path_names_a_checkpoint_or_a_run(tmp_path: Path, form: str) -> None:
    config = recipe()
    whole = run_here(until(20, config), tmp_path / "old")
    named = tmp_path / "old" / ("" if form == "run" else "checkpoints/step-000010")
    resumed = run_here(until(30, config), tmp_path / "new", resume=str(named))
    steps = [line["step"] for line in lines_of(tmp_path / "new" / "steps.jsonl")]
    assert steps[0] == (21 if form == "run" else 11) and steps[-1] == 30
    assert resumed["data"]["samples_seen"] > whole["data"]["samples_seen"]


def test_a_path_that_is_neither_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is neither a checkpoint nor a run directory with one; name a checkpoints"):
        run_here(recipe(), tmp_path / "new", resume=str(tmp_path))


def test_an_older_checkpoint_named_takes_the_place_of_later_ones(tmp_path: Path) -> None:
    """Checkpoints of steps that run again would be taken for newer ones, and push the real ones out."""
    config = recipe(checkpoint={"every_steps": 10, "keep": 2})
    run_here(until(40, config), tmp_path)
    assert saved_steps(tmp_path) == [30, 40]
    again = recipe(checkpoint={"every_steps": 5, "keep": 2})
    run_here(until(35, again), tmp_path, resume=str(tmp_path / "checkpoints/step-000030"))
    assert saved_steps(tmp_path) == [30, 35]


def spoil(checkpoint: Path) -> None:
    os.truncate(checkpoint / "model.safetensors", 100)


def test_a_truncated_checkpoint_is_passed_over_with_a_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = run_here(until(30, recipe()), tmp_path)
    spoil(tmp_path / "checkpoints/step-000030")
    spoil(tmp_path / "checkpoints/step-000020")
    capsys.readouterr()
    resumed = run_here(until(30, recipe()), tmp_path)
    out = capsys.readouterr().out
    for step in (20, 30):
        assert f"passed over: checkpoint {tmp_path}/checkpoints/step-0000{step} is not usable: model.safetensors" in out
    assert "going on from step 10" in out
    assert resumed["parameters_sha256"] == whole["parameters_sha256"]
    assert load_checkpoint(tmp_path / "checkpoints/step-000030").step == 30, "written anew"


def test_a_spoilt_newest_checkpoint_pushes_no_good_one_out(tmp_path: Path) -> None:
    run_here(until(20, recipe()), tmp_path)
    spoil(tmp_path / "checkpoints/step-000020")
    run_here(until(15, recipe(checkpoint={"every_steps": 5, "keep": 1})), tmp_path)
    assert saved_steps(tmp_path) == [15]


def test_no_usable_checkpoint_is_an_error_and_not_a_new_start(tmp_path: Path) -> None:
    run_here(until(20, recipe()), tmp_path)
    for step in (10, 20):
        spoil(tmp_path / f"checkpoints/step-0000{step}")
    with pytest.raises(
        UserError,
        match=r"none of the 2 checkpoints in .*/checkpoints can be used "
        r"\(checkpoint .*step-000020 is not usable: .*\); remove them to start afresh, or give another --run-dir",
    ):
        run_here(until(20, recipe()), tmp_path)
    assert saved_steps(tmp_path) == [10, 20]


def test_a_checkpoint_named_and_spoilt_is_an_error(tmp_path: Path) -> None:
    run_here(until(20, recipe()), tmp_path)
    path = tmp_path / "checkpoints/step-000020"
    spoil(path)
    with pytest.raises(UserError, match=r"step-000020 is not usable: model\.safetensors has 100 bytes instead of"):
        run_here(until(30, recipe()), tmp_path, resume=str(path))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_checkpoint_that_one_rank_cannot_read_is_left_by_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    run_here(until(20, recipe()), tmp_path)
    said: list[list[str]] = [[], [], []]
    this = threading.local()

    def load(path: Path) -> Any:
        if this.rank == rank and path.name == "step-000020":
            raise UserError("step-000020 is not on this host")
        return load_checkpoint(path)

    def chosen(comm: FakeCommunicator) -> int:
        this.rank = comm.rank
        found = choose_checkpoint(comm, tmp_path / "checkpoints", "auto", said[comm.rank].append)
        assert found is not None
        return found.step

    monkeypatch.setattr(module, "load_checkpoint", load)
    assert run_group(3, chosen) == [10] * 3
    told = "passed over: step-000020 is not on this host" + (f" (rank {rank})" if rank else "")
    assert said == [[told]] * 3


def test_the_newest_is_what_a_run_directory_stands_for(tmp_path: Path) -> None:
    run_here(until(20, recipe()), tmp_path)
    newest = tmp_path / "checkpoints/step-000020"
    assert find_checkpoint(tmp_path) == find_checkpoint(newest) == newest


def test_an_empty_folder_is_a_new_start(tmp_path: Path) -> None:
    assert choose_checkpoint(alone(), tmp_path / "none", "auto", print) is None


def test_a_folder_that_was_never_renamed_is_no_checkpoint(tmp_path: Path) -> None:
    """What a kill in the midst of a save leaves."""
    run_here(until(10, recipe()), tmp_path)
    path = tmp_path / "checkpoints"
    shutil.copytree(path / "step-000010", path / ".step-000020.partial")
    found = choose_checkpoint(alone(), path, "auto", print)
    assert found is not None and found.step == 10
