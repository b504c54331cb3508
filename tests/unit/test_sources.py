from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from hpctrain.data.sources import Entry, folder_source, read_range, tar_source
from hpctrain.errors import MachineError, UserError
from tests.unit.image_folders import encoded, image_folder


def tar_of(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for seed, name in enumerate(names):
            member = tarfile.TarInfo(name)
            data = encoded(seed)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_a_tar_is_read_in_place(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "src", {"train": 2, "val": 1})
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        tar.add(folder, "set")
    one, other = folder_source(folder), tar_source(tmp_path / "set.tar")
    assert one.classes == other.classes
    assert [(e.split, e.label, e.name, one.read(e)) for e in one.entries] == [
        (e.split, e.label, e.name, other.read(e)) for e in other.entries
    ]


def test_files_of_no_concern_are_passed_over(tmp_path: Path) -> None:
    names = ["set/README.txt", "set/a/1.jpg", "set/a/._1.jpg", "set/b/2.PNG", "set/b/Thumbs.db", "set/.hidden.jpg"]
    assert [entry.name for entry in tar_source(tar_of(tmp_path / "a.tar", names)).entries] == ["1.jpg", "2.PNG"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"a\.tar holds no pictures \(\.jpg, \.jpeg, \.png\): give a tar of an image folder"),
        (["1.jpg"], r"a\.tar holds 1\.jpg outside a class folder: give a tar of an image folder"),
        (["a/1.jpg", "a/2.jpg"], r"a\.tar holds one class only \(a\)"),
        (["x/a/1.jpg", "y/b/1.jpg"], r"a\.tar holds class folders in x, y: it must hold them in one folder, or in"),
        (["a/1.jpg", "x/b/1.jpg"], r"a\.tar holds class folders in its top, x"),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"], r"the val part of .*a\.tar lacks b"),
    ],
)
def test_tars_of_another_form(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tar_source(tar_of(tmp_path / "a.tar", names))


def test_tars_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for length in range(512, 5 * 512, 64):
        tar_of(path, ["a/1.jpg", "b/2.jpg"])
        os.truncate(path, length)
        with pytest.raises(UserError, match=r"a\.tar is not a whole tar archive \(.*\): fetch it again"):
            tar_source(path)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"a\.tar is not a whole tar archive \(.*\): fetch it again"):
        tar_source(path)
    path.unlink()
    with pytest.raises(UserError, match=r"a\.tar does not exist: check the path"):
        tar_source(path)


def test_links_in_a_tar(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "src", {"": 1})
    os.link(folder / "ant/ant0.jpg", folder / "bee/same.jpg")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder, "set")
    with pytest.raises(UserError, match=r"holds set/bee/same\.jpg as a link: make it again with `tar --hard-deref"):
        tar_source(tmp_path / "a.tar")


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="gone cannot be read: No such file"):
        read_range(Entry("train", 0, "gone", str(tmp_path / "gone"), 0, 10))
