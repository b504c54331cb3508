from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.header import read_header
from hpctrain.data.manifest import open_packed, read_manifest
from hpctrain.data.pack import pack
from hpctrain.data.packer import PackOptions, PackResult
from hpctrain.data.progress import no_progress
from hpctrain.data.reader import SampleReader
from hpctrain.data.shard import ShardWriter
from hpctrain.errors import MachineError, UserError
from tests.needs import needs
from tests.unit.image_folders import encoded, image_folder, tree

SMALL = PackOptions(shard_mb=0.02, jobs=1)  # half a dozen pictures a shard


def packed(source: Path, destination: Path, options: PackOptions = SMALL) -> PackResult:
    return pack(source, destination, options, no_progress)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "src", {"train": 6, "val": 2})


def test_every_picture_is_found_again_byte_for_byte(folder: Path, tmp_path: Path) -> None:
    result = packed(folder, tmp_path / "dst")
    assert result.samples == {"train": 18, "val": 6}
    assert result.summary().startswith(f"{tmp_path / 'dst'} holds 18 train and 6 val pictures of 3 classes in ")
    for split, index in open_packed(tmp_path / "dst").items():
        assert index.classes == ("ant", "bee", "cat")
        wanted = {path.read_bytes(): path.parent.name for path in (folder / split).rglob("*.jpg")}
        found = SampleReader(index).read(range(len(index)))
        assert {data: index.classes[label] for data, label in zip(found, index.labels, strict=True)} == wanted
        for data, record in zip(found, index.samples, strict=True):
            header = read_header(data)
            assert (header.width, header.height) == (record["width"], record["height"])


def test_webdataset_reads_the_shards(folder: Path, tmp_path: Path) -> None:
    needs("webdataset")
    import webdataset

    packed(folder, tmp_path / "dst")
    index = open_packed(tmp_path / "dst")["train"]
    samples = list(webdataset.WebDataset(list(index.shards), shardshuffle=False, empty_check=False))
    assert [sample["jpg"] for sample in samples] == SampleReader(index).read(range(len(index)))
    assert [int(sample["cls"]) for sample in samples] == index.labels.tolist()
    assert f":{samples[3]['__key__']}.jpg" in index.name(3)


def test_shards_mix_the_classes(tmp_path: Path) -> None:
    packed(image_folder(tmp_path / "src", {"": 30}), tmp_path / "dst", PackOptions(shard_mb=0.05))
    index = open_packed(tmp_path / "dst")["train"]
    assert len(index.shards) > 2
    for shard in range(len(index.shards) - 1):
        assert set(index.labels[index.samples["shard"] == shard].tolist()) == {0, 1, 2}


def test_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "a")
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    packed(elsewhere, tmp_path / "b", PackOptions(shard_mb=0.02, jobs=4))
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(tree(tmp_path / "a")) > 6


@pytest.mark.parametrize("ending", [".tar", ".tar.gz", ".tgz"])
@pytest.mark.parametrize("top", ["src", ".", "a/b"])
def test_a_tar_gives_what_its_folder_gives(folder: Path, tmp_path: Path, ending: str, top: str) -> None:
    archive = tmp_path / f"set{ending}"
    with tarfile.open(archive, "w" if ending == ".tar" else "w:gz") as tar:
        tar.add(folder, top)
    packed(archive, tmp_path / "a")
    packed(folder, tmp_path / "b")
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


class Killed(BaseException):
    """The end of the process, as far as it can be played within it."""


@pytest.mark.parametrize("method", ["add", "finish"])
@pytest.mark.parametrize("lives", [0, 1, 2, 3])
def test_a_pack_that_was_killed_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, lives: int
) -> None:
    packed(folder, tmp_path / "whole")
    whole = tree(tmp_path / "whole")
    calls = 0

    def dies(self: ShardWriter, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls > lives * (5 if method == "add" else 1):
            raise Killed
        return original(self, *arguments)

    original = getattr(ShardWriter, method)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, method, dies)
        # A killed process does not tidy up after itself.
        patch.setattr(ShardWriter, "abandon", lambda self: self._file._file.flush())
        with pytest.raises(Killed):
            packed(folder, tmp_path / "dst")
    done = {name: data for name, data in tree(tmp_path / "dst").items() if not name.startswith(".")}
    assert all(whole[name] == data for name, data in done.items())
    with pytest.raises(UserError, match="was not packed to its end: run the same `hpctrain data pack` again"):
        open_packed(tmp_path / "dst")
    result = packed(folder, tmp_path / "dst")
    assert tree(tmp_path / "dst") == whole
    finished = sum(
        shard.samples
        for split in read_manifest(tmp_path / "dst").splits.values()
        for shard in split.shards
        if shard.name in done
    )
    assert result.packed_now == 24 - finished


def test_a_complete_pack_is_left_as_it_is(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "dst")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()}
    assert packed(folder, tmp_path / "dst").packed_now == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "dst").iterdir()} == before


def test_a_full_disk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: ShardWriter, name: str, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "_add_member", full)
        with pytest.raises(
            MachineError, match=r"train-000000\.tar cannot be written \(No space left on device\): make"
        ):
            packed(folder, tmp_path / "dst")
    assert not list((tmp_path / "dst").rglob("*.tar"))
    assert packed(folder, tmp_path / "dst").packed_now == 24


def test_corrupt_pictures_are_refused_or_left_out(folder: Path, tmp_path: Path) -> None:
    (folder / "train/bee/bee1.jpg").write_bytes(b"")
    (folder / "train/cat/cat0.jpg").write_text("this is text")
    (folder / "val/ant/ant0.jpg").write_bytes(encoded(1, 300, 300)[:-300])
    with pytest.raises(UserError, match=r"3 pictures of .*src cannot be used") as caught:
        packed(folder, tmp_path / "dst")
    for line in ("train/bee/bee1.jpg is empty", "train/cat/cat0.jpg is neither", "val/ant/ant0.jpg does not decode"):
        assert line in str(caught.value)
    assert "--skip-corrupt" in str(caught.value)
    result = packed(folder, tmp_path / "dst", PackOptions(shard_mb=0.02, skip_corrupt=True))
    assert (result.samples, result.packed_now) == ({"train": 16, "val": 5}, 0)
    assert len(result.corrupt) == 3
    assert "3 corrupt ones left out" in result.summary()
    assert len(open_packed(tmp_path / "dst")["train"]) == 16


def test_a_class_that_loses_its_last_picture(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "src", {"": 1})
    (folder / "bee/bee0.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="class bee has no usable picture in train: add one"):
        packed(folder, tmp_path / "dst", PackOptions(skip_corrupt=True))


def test_a_png_by_another_name_is_stored_as_what_it_is(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "src", {"": 1})
    (folder / "ant/ant0.jpg").write_bytes(encoded(3, form="PNG"))
    packed(folder, tmp_path / "dst")
    index = open_packed(tmp_path / "dst")["train"]
    names = sorted(index.name(i).rpartition("-")[2] for i in range(3))
    assert names == ["ant0.png", "bee0.jpg", "cat0.jpg"]


def test_destinations_that_are_taken(folder: Path, tmp_path: Path) -> None:
    other = image_folder(tmp_path / "other", {"": 2})
    packed(other, tmp_path / "dst")
    with pytest.raises(UserError, match="holds another packed data set: remove it or choose another folder"):
        packed(folder, tmp_path / "dst")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match="full is not empty: choose a folder of its own"):
        packed(folder, tmp_path / "full")
    with pytest.raises(UserError, match=r"thesis\.tex is a file: choose a folder"):
        packed(folder, tmp_path / "full" / "thesis.tex")
    with pytest.raises(UserError, match=r"src/packed lies within .*src: choose a folder outside"):
        packed(folder, folder / "packed")
    with pytest.raises(UserError, match="dst is a packed data set: name the image folder"):
        packed(tmp_path / "dst", tmp_path / "again")


def test_an_unfinished_pack_of_something_else(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: ShardWriter) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            packed(folder, tmp_path / "dst")
    assert not list((tmp_path / "dst").rglob("*.tar"))
    for options in (PackOptions(shard_mb=0.05), SMALL):
        (folder / "train/ant/ant0.jpg").write_bytes(encoded(99, 60, 60))
        with pytest.raises(UserError, match="holds an unfinished pack of another source or with other options"):
            packed(folder, tmp_path / "dst", options)


def test_two_at_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, over = threading.Event(), threading.Event()
    original = ShardWriter.finish

    def waits(self: ShardWriter) -> object:
        begun.set()
        over.wait(10)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "finish", waits)
        first = threading.Thread(target=packed, args=(folder, tmp_path / "dst"))
        first.start()
        begun.wait(10)
        with pytest.raises(UserError, match=r"another process packs into .*dst: wait for it, or run one task only"):
            packed(folder, tmp_path / "dst")
        over.set()
        first.join(10)
    assert packed(folder, tmp_path / "dst").packed_now == 0


def test_file_systems_without_locks(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(number: int) -> None:
        def flock(file: object, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuses(errno.EIO)
    with pytest.raises(MachineError, match=r"plan\.json cannot be locked: Input/output error"):
        packed(folder, tmp_path / "dst")
    refuses(errno.ENOLCK)
    assert packed(folder, tmp_path / "dst").packed_now == 24


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist: name an image folder, a tar of one or a folder with"):
        packed(tmp_path / "nowhere", tmp_path / "dst")
    (tmp_path / "a.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"a\.zip is neither a folder nor a \.tar"):
        packed(tmp_path / "a.zip", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_compressed_tar_that_is_cut_short(folder: Path, tmp_path: Path) -> None:
    archive = tmp_path / "set.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, "src")
    os.truncate(archive, archive.stat().st_size // 2)
    with pytest.raises(UserError, match=r"set\.tar\.gz cannot be unpacked .*: fetch it again"):
        packed(archive, tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_a_source_that_shrinks_meanwhile(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ShardWriter.__init__

    def shrinks(self: ShardWriter, path: Path, partial: Path) -> None:
        for picture in folder.rglob("*.jpg"):
            os.truncate(picture, 10)
        original(self, path, partial)

    monkeypatch.setattr(ShardWriter, "__init__", shrinks)
    with pytest.raises(UserError, match="became shorter while it was packed: leave it alone and pack again"):
        packed(folder, tmp_path / "dst")


def test_the_manifest_tells_what_is_there(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "dst")
    told = json.loads((tmp_path / "dst/dataset.json").read_text())
    assert told["schema"] == "hpctrain-dataset-1"
    assert told["classes"] == ["ant", "bee", "cat"]
    shards = told["splits"]["train"]["shards"]
    assert sum(shard["samples"] for shard in shards) == told["splits"]["train"]["samples"] == 18
    assert [shard["name"] for shard in shards] == [f"train-{number:06d}.tar" for number in range(len(shards))]
    assert np.load(tmp_path / "dst/train.index.npy").shape == (18,)
