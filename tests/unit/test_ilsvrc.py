from __future__ import annotations

import io
import os
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.ilsvrc import IlsvrcArchives, ilsvrc_source
from hpctrain.data.manifest import open_packed
from hpctrain.data.pack import pack
from hpctrain.data.packer import PackOptions
from hpctrain.data.progress import no_progress
from hpctrain.data.reader import SampleReader
from hpctrain.errors import UserError
from tests.needs import needs
from tests.unit.image_folders import encoded

needs("scipy")

# In the devkit's order, which is not that of the WordNet ids; the fourth is an inner node without pictures.
SYNSETS = ["n02119789", "n01440764", "n09999999", "n00001740"]
LABELS = {"n01440764": 0, "n02119789": 1, "n09999999": 2}
ANSWERS = [3, 1, 2, 1, 1]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def class_tar(wordnet_id: str, count: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(count):
            add(tar, f"{wordnet_id}_{number}.JPEG", encoded(LABELS[wordnet_id] * 100 + number))
    return buffer.getvalue()


def meta() -> bytes:
    from scipy.io import savemat

    types = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(i + 1, name, f"words of {name}", 0 if name in LABELS else 3) for i, name in enumerate(SYNSETS)]
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": np.array(rows, dtype=types).reshape(-1, 1)})
    return buffer.getvalue()


def devkit(path: Path, answers: str, meta_mat: bytes) -> None:
    with tarfile.open(path, "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", answers.encode())
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta_mat)


@pytest.fixture
def archives(tmp_path: Path) -> IlsvrcArchives:
    found = IlsvrcArchives(*(tmp_path / name for name in ("train.tar", "val.tar", "devkit.tar.gz")))
    with tarfile.open(found.train, "w") as tar:
        for wordnet_id in SYNSETS[:3]:
            add(tar, f"{wordnet_id}.tar", class_tar(wordnet_id, 4))
    with tarfile.open(found.val, "w") as tar:
        for number in (2, 1, 5, 3, 4):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", encoded(1000 + number))
    devkit(found.devkit, "".join(f"{answer}\n" for answer in ANSWERS), meta())
    return found


def test_archives_become_a_packed_set(archives: IlsvrcArchives, tmp_path: Path) -> None:
    result = pack(archives, tmp_path / "dst", PackOptions(shard_mb=0.02), no_progress)
    assert result.samples == {"train": 12, "val": 5}
    splits = open_packed(tmp_path / "dst")
    assert splits["train"].classes == tuple(sorted(LABELS))
    found = {
        split: dict(zip(SampleReader(index).read(range(len(index))), index.labels.tolist(), strict=True))
        for split, index in splits.items()
    }
    assert found["train"] == {encoded(label * 100 + n): label for label in LABELS.values() for n in range(4)}
    assert found["val"] == {
        encoded(1000 + number): LABELS[SYNSETS[answer - 1]] for number, answer in enumerate(ANSWERS, 1)
    }
    names = [splits["train"].name(i) for i in range(12)]
    assert sum("-n01440764_" in name for name in names) == 4


def test_another_archive_in_place_of_training(archives: IlsvrcArchives) -> None:
    with pytest.raises(UserError, match="holds ILSVRC2012_val_00000002, not a tar of a class: is it the train archive"):
        ilsvrc_source(IlsvrcArchives(archives.val, archives.val, archives.devkit))


def test_another_archive_in_place_of_validation(archives: IlsvrcArchives, tmp_path: Path) -> None:
    with tarfile.open(archives.val, "a") as tar:
        add(tar, "stray.jpg", b"")
    with pytest.raises(UserError, match=r"holds stray\.jpg, not named as a validation picture: is it the val archive"):
        ilsvrc_source(archives)


def test_training_archive_cut_short(archives: IlsvrcArchives) -> None:
    os.truncate(archives.train, archives.train.stat().st_size // 2)
    with pytest.raises(UserError, match=r"train\.tar(:n\d+\.tar)? is not a whole tar archive"):
        ilsvrc_source(archives)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (b"no tar" * 200, r"train\.tar:n01440764\.tar is not a whole tar archive"),
        (class_tar("n01440764", 3)[:3000], r"train\.tar:n01440764\.tar is not a whole tar archive"),
        (class_tar("n01440764", 3)[: 2 * 1536], r"train\.tar:n01440764\.tar is not a whole tar archive"),
    ],
)
def test_inner_archive_broken(archives: IlsvrcArchives, inner: bytes, message: str) -> None:
    with tarfile.open(archives.train, "w") as tar:
        add(tar, "n01440764.tar", inner)
        add(tar, "n02119789.tar", class_tar("n02119789", 1))
    with pytest.raises(UserError, match=message):
        ilsvrc_source(archives)


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ("1\n2\n", r"val\.tar holds 5 pictures and .*devkit\.tar\.gz 2 answers, or numbers are missing: fetch both"),
        ("1\n2\n3\n1\n9\n", r"ground_truth\.txt in .* has an entry that meta\.mat does not explain: 9"),
        ("1\n2\n3\n1\nx\n", r"ground_truth\.txt in .* has an entry that meta\.mat does not explain: invalid literal"),
        ("1\n2\n3\n1\n4\n", r"gives ILSVRC2012_val_00000005\.JPEG the class n00001740, which train lacks"),
    ],
)
def test_answers_that_do_not_fit(archives: IlsvrcArchives, answers: str, message: str) -> None:
    devkit(archives.devkit, answers, meta())
    with pytest.raises(UserError, match=message):
        ilsvrc_source(archives)


def test_devkit_that_is_none(archives: IlsvrcArchives) -> None:
    devkit(archives.devkit, "1\n", b"not MATLAB")
    with pytest.raises(UserError, match=r"meta\.mat of .*devkit\.tar\.gz cannot be read .*: fetch the devkit again"):
        ilsvrc_source(archives)
    with tarfile.open(archives.devkit, "w:gz") as tar:
        add(tar, "readme.txt", b"")
    with pytest.raises(UserError, match=r"devkit\.tar\.gz lacks ILSVRC2012_validation_ground_truth\.txt: give the dev"):
        ilsvrc_source(archives)
    archives.devkit.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"devkit\.tar\.gz cannot be read as the devkit archive"):
        ilsvrc_source(archives)


def test_without_scipy(archives: IlsvrcArchives, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"reading meta\.mat of .* needs scipy: pip install scipy"):
        ilsvrc_source(archives)
