from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.manifest import file_sha256, open_packed
from hpctrain.data.pack import pack
from hpctrain.data.packer import PackOptions
from hpctrain.data.progress import no_progress
from hpctrain.data.verify import VerifyReport, verify
from hpctrain.errors import UserError
from tests.unit.image_folders import encoded, image_folder, tree


def checked(path: Path, jobs: int = 1) -> VerifyReport:
    return verify(path, jobs=jobs, progress=no_progress)


def problems(report: VerifyReport, root: Path) -> set[tuple[str, str]]:
    return {(finding.kind, os.path.relpath(finding.name, root)) for finding in report.problems}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "src", {"train": 4, "val": 2}, ("n01440764", "n01443537", "cat"))


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    return pack(folder, tmp_path / "packed", PackOptions(shard_mb=0.02), no_progress).destination


def test_sound_sets(folder: Path, packed: Path) -> None:
    for path in (folder, packed):
        before = tree(path)
        report = checked(path)
        assert report.ok
        assert (report.pictures, report.num_classes) == (18, 3)
        assert report.text().endswith("no problems.")
        assert report.to_record()["problems"] == []
        assert tree(path) == before


def spoil(folder: Path) -> set[tuple[str, str]]:
    """Put one of each fault into a folder."""
    whole = encoded(77, 300, 300)
    damaged = bytearray(encoded(78, 64, 64, form="PNG"))
    middle = damaged.index(b"IDAT") + 10
    damaged[middle : middle + 20] = bytes(20)
    faults = {
        "train/cat/a.jpg": ("zero-byte", b""),
        "train/cat/b.jpg": ("not-an-image", b"just some text"),
        "train/cat/c.jpg": ("truncated", whole[: len(whole) // 2]),
        "train/cat/d.png": ("corrupt", bytes(damaged)),
        "train/cat/e.jpg": ("cmyk", encoded(79, mode="CMYK")),
        "train/cat/n01440764_12.JPEG": ("mislabelled", encoded(80)),
        "val/n01443537/n01440764_7.JPEG": ("mislabelled", encoded(81)),
        "val/n01443537/twin.jpg": ("mislabelled", (folder / "train/cat/cat0.jpg").read_bytes()),
    }
    for name, (_, data) in faults.items():
        (folder / name).write_bytes(data)
    return {(kind, name) for name, (kind, _) in faults.items()}


@pytest.mark.parametrize("jobs", [1, 2])
def test_every_fault_is_named(folder: Path, jobs: int) -> None:
    planted = spoil(folder)
    report = checked(folder, jobs)
    assert problems(report, folder) == planted
    assert not report.ok
    text = report.text()
    assert "1 cmyk, 1 corrupt, 3 mislabelled, 1 not-an-image, 1 truncated, 1 zero-byte" in text
    assert f"truncated: {folder}/train/cat/c.jpg does not decode" in text
    assert f"twin.jpg is the same picture as {folder}/train/cat/cat0.jpg in class cat" in text
    assert json.loads(json.dumps(report.to_record()))["ok"] is False


def test_faults_that_a_pack_keeps_are_found_in_it(folder: Path, tmp_path: Path) -> None:
    spoil(folder)
    pack(folder, tmp_path / "dst", PackOptions(skip_corrupt=True), no_progress)
    found = sorted((finding.kind, finding.name.rpartition("-")[2]) for finding in checked(tmp_path / "dst").problems)
    assert found == [
        ("cmyk", "e.jpg"),
        ("corrupt", "d.png"),
        ("mislabelled", "n01440764_12.jpg"),
        ("mislabelled", "n01440764_7.jpg"),
        ("mislabelled", "twin.jpg"),
    ]


def test_what_is_worth_knowing_is_no_problem(folder: Path) -> None:
    (folder / "train/cat/png.jpg").write_bytes(encoded(90, form="PNG"))
    (folder / "train/cat/grey.jpg").write_bytes(encoded(91, mode="L"))
    shutil.copy(folder / "train/cat/cat0.jpg", folder / "val/cat/again.jpg")
    report = checked(folder)
    assert report.ok
    assert {(note.kind, Path(note.name).name) for note in report.notes} == {
        ("ending", "png.jpg"),
        ("grey", "grey.jpg"),
        ("in-both-parts", "again.jpg"),
    }
    assert "Worth knowing: 1 ending, 1 grey, 1 in-both-parts." in report.text()
    assert "png.jpg is a PNG by its contents" in report.text()


def test_long_lists_of_notes_are_cut_in_the_text_alone(folder: Path) -> None:
    for number in range(60):
        (folder / f"train/cat/p{number}.jpg").write_bytes(encoded(100 + number, 4, 4, form="PNG"))
    report = checked(folder)
    assert "and 10 more, all of them in the JSON report" in report.text()
    assert len(report.to_record()["notes"]) == 60


@pytest.mark.parametrize(
    ("class_name", "other", "file_name", "flagged"),
    [
        ("cat", "dog", "dog_1.jpg", True),
        ("cat", "dog", "dog-park.jpg", True),
        ("cat", "dog", "dogma.jpg", False),
        ("cat", "cat_big", "cat_big_1.jpg", False),
        ("cat_big", "cat", "cat_1.jpg", True),
        ("5", "3", "3_12.jpg", False),
    ],
)
def test_names_that_say_another_class(
    tmp_path: Path, class_name: str, other: str, file_name: str, flagged: bool
) -> None:
    folder = image_folder(tmp_path / "src", {"": 1}, (class_name, other))
    (folder / class_name / file_name).write_bytes(encoded(50))
    assert problems(checked(folder), folder) == ({("mislabelled", f"{class_name}/{file_name}")} if flagged else set())


def test_a_file_without_the_right_to_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.pread

    def refuse(descriptor: int, length: int, offset: int) -> bytes:
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith("train/cat/cat1.jpg"):
            raise PermissionError(13, "Permission denied")
        return original(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", refuse)
    report = checked(folder)
    assert problems(report, folder) == {("unreadable", "train/cat/cat1.jpg")}


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_a_truncated_shard(packed: Path) -> None:
    os.truncate(packed / "train-000000.tar", 3000)
    (packed / "train-000001.tar").unlink()
    report = checked(packed)
    assert problems(report, packed) == {("shard", "train-000000.tar"), ("shard", "train-000001.tar")}
    assert report.pictures == 6


def test_a_shard_with_other_contents(packed: Path) -> None:
    index = open_packed(packed)["train"]
    record = index.samples[1]
    overwrite(packed / "train-000000.tar", int(record["offset"]) + int(record["length"]) // 2, b"\0\1\2\3")
    assert ("digest", "train-000000.tar") in problems(checked(packed), packed)


def test_a_label_that_differs_from_the_index(packed: Path) -> None:
    record = open_packed(packed)["train"].samples[0]
    after = int(record["offset"]) + -(-int(record["length"]) // 512) * 512
    overwrite(packed / "train-000000.tar", after + 512, str((int(record["label"]) + 1) % 3).encode())
    assert problems(checked(packed), packed) == {("digest", "train-000000.tar"), ("index", "train-000000.tar")}


def test_a_tar_that_is_broken_inside(packed: Path) -> None:
    record = open_packed(packed)["train"].samples[1]
    overwrite(packed / "train-000000.tar", int(record["offset"]) - 512, b"\xff" * 512)
    assert problems(checked(packed), packed) == {("digest", "train-000000.tar"), ("tar", "train-000000.tar")}


@pytest.mark.parametrize("forge_digest", [False, True])
def test_an_index_of_other_shards(packed: Path, forge_digest: bool) -> None:
    path = packed / "val.index.npy"
    samples = np.load(path)
    samples["label"] = samples["label"][::-1].copy()
    np.save(path, samples)
    if forge_digest:
        told = json.loads((packed / "dataset.json").read_text())
        told["splits"]["val"]["index_sha256"] = file_sha256(path)
        (packed / "dataset.json").write_text(json.dumps(told))
    report = checked(packed)
    assert problems(report, packed) == {("index", "val-000000.tar" if forge_digest else "val.index.npy")}


def test_what_is_no_data_set(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(UserError, match="nowhere does not exist"):
        checked(tmp_path / "nowhere")
    (packed / "dataset.json").write_text("")
    with pytest.raises(UserError, match=r"dataset\.json cannot be read"):
        checked(packed)
