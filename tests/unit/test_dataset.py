from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from hpctrain.config.schema import DataConfig
from hpctrain.data import manifest as manifest_module
from hpctrain.data.dataset import Dataset, open_dataset
from hpctrain.data.pack import pack
from hpctrain.data.packer import PackOptions
from hpctrain.data.progress import no_progress
from hpctrain.data.reader import SampleReader
from hpctrain.errors import UserError
from tests.unit.fake_group import FakeCommunicator, run_group
from tests.unit.image_folders import encoded, image_folder, tree


def opened(path: Path | None, world_size: int = 1, **options: object) -> Dataset:
    """The data set of the last rank; all have the same or raise the same."""
    data = DataConfig(path=str(path) if path else None, **options)

    def work(comm: FakeCommunicator) -> Dataset | UserError:
        try:
            return open_dataset(comm, data, 1, no_progress)
        except UserError as error:
            return error

    results = run_group(world_size, work)
    if isinstance(results[0], UserError):
        assert [str(result) for result in results] == [str(results[0])] * world_size
        raise results[0]
    for result in results:
        assert isinstance(result, Dataset)
        for part in ("train", "val"):
            mine, first = getattr(result, part), getattr(results[0], part)
            assert np.array_equal(mine.samples, first.samples)
            assert (mine.shards, mine.classes) == (first.shards, first.classes)
    return results[-1]


def pictures(dataset: Dataset, part: str) -> set[tuple[str, bytes]]:
    index = getattr(dataset, part)
    data = SampleReader(index).read(range(len(index)))
    return {(index.classes[label], picture) for label, picture in zip(index.labels, data, strict=True)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "src", {"train": 6, "val": 2})


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    return pack(folder, tmp_path / "packed", PackOptions(shard_mb=0.02), no_progress).destination


@pytest.mark.parametrize("world_size", [1, 3])
def test_folder_and_packed_set_are_the_same_data(folder: Path, packed: Path, world_size: int) -> None:
    for part in ("train", "val"):
        wanted = {(path.parent.name, path.read_bytes()) for path in (folder / part).rglob("*.jpg")}
        assert pictures(opened(folder, world_size), part) == wanted
        assert pictures(opened(packed, world_size), part) == wanted


def test_a_folder_is_not_written_to(folder: Path) -> None:
    before = tree(folder)
    opened(folder)
    assert tree(folder) == before


def test_orientation_and_upright_size_are_in_the_index(folder: Path) -> None:
    (folder / "train/ant/ant0.jpg").write_bytes(encoded(5, 40, 20, orientation=6))
    train = opened(folder).train
    record = train.samples[list(train.shards).index(str(folder / "train/ant/ant0.jpg"))]
    assert (record["width"], record["height"], record["orientation"]) == (20, 40, 6)


def test_file_names_of_any_bytes(folder: Path) -> None:
    os.rename(folder / "train/ant/ant0.jpg", os.fsencode(folder / "train/ant") + b"/\xff new\nline.jpg")
    assert len(pictures(opened(folder, 2), "train")) == 18


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_held_out_part_is_the_same_packed_or_not_for_any_world_size(tmp_path: Path, world_size: int) -> None:
    folder = image_folder(tmp_path / "src", {"": 8})
    packed = pack(folder, tmp_path / "dst", PackOptions(shard_mb=0.02), no_progress).destination
    one, other = opened(folder, val_fraction=0.25), opened(packed, world_size, val_fraction=0.25)
    for part in ("train", "val"):
        assert pictures(one, part) == pictures(other, part)
    assert not pictures(one, "train") & pictures(one, "val")
    assert len(one.train) + len(one.val) == 24


def test_a_folder_train_alone_can_be_split(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "src", {"train": 8})
    assert len(opened(folder, val_fraction=0.5).train) < 24


def test_synthetic_needs_no_files() -> None:
    dataset = opened(None, 2, loader="synthetic", synthetic_samples=500, image_size=32)
    assert (len(dataset.train), len(dataset.val), len(dataset.classes)) == (500, 20, 1000)
    dataset = opened(None, loader="synthetic", synthetic_samples=500, num_classes=3)
    assert set(dataset.train.labels.tolist()) == {0, 1, 2}
    assert not np.array_equal(dataset.train.labels[:20], dataset.val.labels)


def remove_pictures(folder: Path) -> None:
    for path in (folder / "train/bee").iterdir():
        path.unlink()


FOLDER_ERRORS = {
    "missing": (shutil.rmtree, "the data folder .*src does not exist: set data.path to a packed or image folder"),
    "empty": (lambda f: [shutil.rmtree(f / p) for p in ("train", "val")], "src holds no class folders: it must hold"),
    "empty train": (lambda f: [shutil.rmtree(f / "train"), (f / "train").mkdir()], "train holds no class folders"),
    "class without pictures": (remove_pictures, r"class folder .*train/bee holds no pictures \(.jpg, .jpeg, .png\)"),
    "one class": (
        lambda f: [shutil.rmtree(f / p / c) for p in ("train", "val") for c in ("bee", "cat")],
        r"train holds one class only \(ant\): a classifier needs two or more",
    ),
    "zero bytes": (
        lambda f: (f / "train/bee/bee3.jpg").write_bytes(b""),
        r"train/bee/bee3\.jpg is empty: run `hpctrain data verify` on the folder and remove what it lists",
    ),
    "text": (
        lambda f: [(f / f"val/{c}/{c}1.jpg").write_text("hello") for c in ("bee", "cat")],
        r"val/bee/bee1\.jpg is neither a JPEG nor a PNG and 1 more cannot be used: run `hpctrain data verify`",
    ),
    "no validation": (lambda f: shutil.rmtree(f / "val"), "has no validation part: set data.val_fraction or add one"),
    "no training": (lambda f: shutil.rmtree(f / "train"), "has a folder val but no folder train: add it"),
    "class missing in val": (lambda f: shutil.rmtree(f / "val/ant"), "the val part of .*src lacks ant: both parts"),
    "class of val alone": (
        lambda f: shutil.copytree(f / "val/ant", f / "val/zoo"),
        "the val part of .*src has zoo beside those of train: both parts must have the same classes",
    ),
    "nested": (
        lambda f: shutil.copytree(f / "val/ant", f / "train/ant/more"),
        "train/ant holds the folder more: pictures must lie directly in their class folder",
    ),
}


@pytest.mark.parametrize("case", FOLDER_ERRORS)
def test_folders_that_will_not_do(folder: Path, case: str) -> None:
    spoil, message = FOLDER_ERRORS[case]
    spoil(folder)
    with pytest.raises(UserError, match=message):
        opened(folder, 2)


def edit(packed: Path, change: dict[str, object]) -> None:
    path = packed / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def swap_labels(packed: Path) -> None:
    path = packed / "train.index.npy"
    samples = np.load(path)
    samples["label"] = samples["label"][::-1]
    np.save(path, samples)


def forge(packed: Path, change: str) -> None:
    """Change an index and make its digest fit, as only someone who repacks by hand would."""
    path = packed / "train.index.npy"
    samples = np.load(path)
    if change == "count":
        samples = samples[:-1]
    else:
        samples["offset"][0] += 512
    np.save(path, samples)
    told = json.loads((packed / "dataset.json").read_text())
    told["splits"]["train"]["index_sha256"] = manifest_module.file_sha256(path)
    (packed / "dataset.json").write_text(json.dumps(told))


def exchange_shards(packed: Path) -> None:
    first, second = packed / "train-000000.tar", packed / "train-000001.tar"
    first_bytes, second_bytes = first.read_bytes(), second.read_bytes()
    size = len(first_bytes)
    first.write_bytes(second_bytes[::-1][:size].ljust(size, b"x"))


PACKED_ERRORS = {
    "truncated shard": (
        lambda p: os.truncate(p / "train-000001.tar", 5000),
        r"the shard .*train-000001\.tar is truncated, 5000 of \d+ bytes: copy it again, or run `hpctrain data pack`",
    ),
    "long shard": (
        lambda p: os.truncate(p / "val-000000.tar", 10**6),
        r"the shard .*val-000000\.tar is too long, 1000000 of \d+ bytes",
    ),
    "missing shard": (
        lambda p: (p / "train-000001.tar").unlink(),
        r"the shard .*train-000001\.tar cannot be read \(No such file or directory\): copy it again",
    ),
    "missing index": (lambda p: (p / "val.index.npy").unlink(), r"val\.index\.npy is missing: pack the data set again"),
    "other index": (swap_labels, r"train\.index\.npy is not the index that belongs to its shards \(its digest differs"),
    "other count": (lambda p: forge(p, "count"), r"train\.index\.npy and .*dataset\.json disagree about the samples"),
    "other offset": (
        lambda p: forge(p, "offset"),
        r"train-000000\.tar does not hold sample 0 where its index says \(byte \d+\): run `hpctrain data pack`",
    ),
    "other shard": (exchange_shards, r"train-000000\.tar does not hold sample 0 where its index says"),
    "no JSON": (
        lambda p: (p / "dataset.json").write_text("{nonsense"),
        r"dataset\.json cannot be read \(Expecting property name.*\): run `hpctrain data pack` again into a new folder",
    ),
    "other schema": (
        lambda p: edit(p, {"schema": "hpctrain-dataset-9"}),
        r"dataset\.json has schema 'hpctrain-dataset-9' where 'hpctrain-dataset-1' is wanted",
    ),
    "other form": (lambda p: edit(p, {"splits": 3}), r"dataset\.json cannot be read \(1 validation error"),
    "one class": (lambda p: edit(p, {"classes": ["ant"]}), r"packed holds one class only \(ant\)"),
    "fewer classes": (lambda p: edit(p, {"classes": ["ant", "bee"]}), r"npy has labels outside 0 … 1"),
}


@pytest.mark.parametrize("case", PACKED_ERRORS)
def test_packed_sets_that_will_not_do(packed: Path, case: str) -> None:
    spoil, message = PACKED_ERRORS[case]
    spoil(packed)
    with pytest.raises(UserError, match=message):
        opened(packed, 2)


def test_requests_that_do_not_fit_the_set(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"data.num_classes is 10 but .*src has 3 classes: leave it out or name another"
    ):
        opened(folder, num_classes=10)
    with pytest.raises(UserError, match=r"src has a validation part: leave out data.val_fraction=0.1"):
        opened(folder, val_fraction=0.1)
    with pytest.raises(UserError, match=r"data.path is not set: name a packed or image folder, or take data.loader="):
        opened(None)
    assert len(opened(folder, num_classes=3).classes) == 3


def test_a_node_that_does_not_see_the_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(comm: FakeCommunicator) -> str:
        with pytest.raises(UserError) as caught:
            open_dataset(comm, DataConfig(path=str(folder)), 1, no_progress)
        return str(caught.value)

    monkeypatch.setattr(os, "access", lambda path, mode: False)
    messages = run_group(2, work)
    assert messages[0] == messages[1]
    assert "cannot be read on host0: data.path must lead to the data on every node" in messages[0]


def test_a_folder_without_the_right_to_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"src cannot be read \(Permission denied\): give yourself the right to"):
        opened(folder)
