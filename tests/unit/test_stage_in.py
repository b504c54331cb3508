"""slurm/stage_in.sh: a packed set on a node's own disk, whole and checked, copied once."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hpctrain.data.manifest import open_packed
from hpctrain.data.pack import pack
from hpctrain.data.packer import PackOptions
from tests.unit.image_folders import image_folder

SCRIPT = Path(__file__).resolve().parents[2] / "slurm/stage_in.sh"


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A packed set of two splits: two shards and two indices. Its name has a blank."""
    pack(image_folder(tmp_path / "pictures", {"train": 3, "val": 1}), tmp_path / "a set", PackOptions(shard_mb=1))
    return tmp_path / "a set"


def stage(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), str(source), str(target)], capture_output=True, text=True, timeout=60, check=False
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def test_a_set_is_copied_whole_and_once(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "node disk" / "set"
    first, second = stage(packed, target), stage(packed, target)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr
    assert ": 4 of 4 files copied to" in first.stdout
    assert ": 0 of 4 files copied to" in second.stdout
    assert contents(target) == contents(packed)
    assert set(open_packed(target)) == {"train", "val"}


@pytest.mark.parametrize("damage", ["truncated", "another byte", "gone", "half copied"])
def test_what_is_not_whole_is_copied_again(packed: Path, tmp_path: Path, damage: str) -> None:
    target = tmp_path / "set"
    stage(packed, target)
    shard = target / "train-000000.tar"
    whole = shard.read_bytes()
    if damage in ("gone", "half copied"):
        shard.unlink()
    if damage == "half copied":
        shard.with_name(f"{shard.name}.part").write_bytes(whole[:10])
    elif damage == "truncated":
        shard.write_bytes(whole[:-1])
    elif damage == "another byte":
        shard.write_bytes(whole[:700] + bytes([whole[700] ^ 1]) + whole[701:])
    done = stage(packed, target)
    assert (done.returncode, contents(target)) == (0, contents(packed)), done.stderr
    assert ": 1 of 4 files copied to" in done.stdout


def test_one_copies_and_the_others_wait(packed: Path, tmp_path: Path) -> None:
    target = tmp_path / "set"
    argv = [str(SCRIPT), str(packed), str(target)]
    started = [subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = sorted(process.communicate(timeout=60)[0].partition(": ")[2].partition(": ")[2][:6] for process in started)
    assert told == ["0 of 4", "0 of 4", "4 of 4"]


def test_a_source_that_is_damaged_is_named(packed: Path, tmp_path: Path) -> None:
    shard = packed / "val-000000.tar"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    done = stage(packed, tmp_path / "set")
    assert done.returncode == 1
    assert f"val-000000.tar came out other than {packed}/dataset.json says: `hpctrain data verify" in done.stderr
    assert not (tmp_path / "set/val-000000.tar").exists() and not (tmp_path / "set/dataset.json").exists()


def test_what_cannot_be_staged_is_told_in_one_sentence(packed: Path, tmp_path: Path) -> None:
    cases = [
        (
            tmp_path / "none",
            tmp_path / "set",
            "none/dataset.json cannot be read: name a folder that `hpctrain data pack`",
        ),
        (
            packed,
            Path("/proc/none"),
            "the folder /proc/none cannot be made: set HPCTRAIN_SCRATCH to a disk of the nodes",
        ),
    ]
    for source, target, text in cases:
        done = stage(source, target)
        assert done.returncode == 2
        assert text in done.stderr and len(done.stderr.splitlines()) == 1
    (packed / "dataset.json").write_text("{}")
    done = stage(packed, tmp_path / "set")
    assert done.returncode == 2
    assert "is not that of a packed data set: run `hpctrain data pack` again" in done.stderr
    assert "two arguments are wanted" in subprocess.run([SCRIPT], capture_output=True, text=True, check=False).stderr


def test_a_disk_that_is_too_small_is_found_before_anything_is_copied(packed: Path, tmp_path: Path) -> None:
    (tmp_path / "df").write_text("#!/bin/bash\necho Avail\necho 1000\n")
    (tmp_path / "df").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    argv = [str(SCRIPT), str(packed), str(tmp_path / "set")]
    done = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "has room for 0 MiB, but" in done.stderr
    assert not contents(tmp_path / "set")
