"""Bad input, as the person who typed it sees it: one sentence that names the thing and the remedy, and exit code 2."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.data.pack import pack
from hpctrain.data.packer import PackOptions
from hpctrain.data.progress import no_progress
from hpctrain.train.rundir import RunDirectory
from tests.integration.commands import Ranks, hpctrain
from tests.needs import needs
from tests.unit.image_folders import image_folder, tree
from tests.unit.small_runs import command, run_here, write_recipe
from tests.unit.small_runs import recipe as small_recipe

pytestmark = pytest.mark.timeout(300)

Keys = dict[str, Any]


def pictures(folder: Path) -> Path:
    """Three classes of 8 pictures to train on and 2 held out."""
    return image_folder(folder, {"train": 8, "val": 2})


def packed(folder: Path) -> Path:
    pack(pictures(folder.with_name("source")), folder, PackOptions(), no_progress)
    return folder


def missing(folder: Path) -> Keys:
    return {}


def empty(folder: Path) -> Keys:
    folder.mkdir()
    return {}


def class_without_pictures(folder: Path) -> Keys:
    bee = pictures(folder) / "train/bee"
    for path in bee.iterdir():
        path.rename(path.with_suffix(".txt"))
    return {}


def one_class(folder: Path) -> Keys:
    image_folder(folder, {"train": 4, "val": 1}, classes=("ant",))
    return {}


def other_classes_held_out(folder: Path) -> Keys:
    (pictures(folder) / "val/bee").rename(folder / "val/wasp")
    return {}


def nothing_held_out(folder: Path) -> Keys:
    image_folder(folder, {"": 4})
    return {}


def zero_bytes(folder: Path) -> Keys:
    (pictures(folder) / "train/ant/ant1.jpg").write_bytes(b"")
    return {}


def text_named_jpg(folder: Path) -> Keys:
    (pictures(folder) / "train/ant/ant1.jpg").write_text("this is no picture")
    return {}


def truncated_shard(folder: Path) -> Keys:
    os.truncate(packed(folder) / "train-000000.tar", 5000)
    return {}


def missing_shard(folder: Path) -> Keys:
    (packed(folder) / "train-000000.tar").unlink()
    return {}


def index_of_another_pack(folder: Path) -> Keys:
    index = packed(folder) / "train.index.npy"
    samples = np.load(index)
    samples["offset"] += 512
    np.save(index, samples)
    return {}


def unfinished_pack(folder: Path) -> Keys:
    (packed(folder) / "dataset.json").unlink()
    (folder / ".packing").mkdir()
    return {}


def wrong_number_of_labels(folder: Path) -> Keys:
    pictures(folder)
    return {"data.num_classes": 5}


def batch_beyond_the_set(folder: Path) -> Keys:
    pictures(folder)
    return {"train.batch_per_worker": 25}


def more_workers_than_ranks(folder: Path) -> Keys:
    pictures(folder)
    return {"parallel.virtual_workers": 3}


def no_gpu(folder: Path) -> Keys:
    return {"train.device": "cuda"}


#: what is wrong with the data or with what is asked of it, and the sentence, where {} stands for data.path
TABLE: list[tuple[Callable[[Path], Keys], str]] = [
    (missing, r"the data folder {} does not exist: set data\.path to a packed or image folder"),
    (empty, r"{} holds no class folders: it must hold one folder of pictures a class"),
    (class_without_pictures, r"the class folder {}/train/bee holds no pictures \(\.jpg, .*\): fill it or remove it"),
    (one_class, r"{}/train holds one class only \(ant\): a classifier needs two or more"),
    (other_classes_held_out, r"the val part of {} lacks bee: both parts must have the same classes"),
    (nothing_held_out, r"{} has no validation part: set data\.val_fraction or add one"),
    (zero_bytes, r"{}/train/ant/ant1\.jpg is empty: run `hpctrain data verify` on the folder and remove what it lists"),
    (
        text_named_jpg,
        r"{}/train/ant/ant1\.jpg is neither a JPEG nor a PNG: run `hpctrain data verify` .*",
    ),
    (truncated_shard, r"the shard {}/train-000000\.tar is truncated, 5000 of \d+ bytes: copy it again, or run `.*"),
    (missing_shard, r"the shard {}/train-000000\.tar cannot be read \(No such file .*\): copy it again, or run `.*"),
    (
        index_of_another_pack,
        r"{}/train\.index\.npy is not the index that belongs to its shards .*: run `hpctrain .*",
    ),
    (unfinished_pack, r"{} was not packed to its end: run the same `hpctrain data pack` again to finish it"),
    (wrong_number_of_labels, r"data\.num_classes is 5 but {} has 3 classes: leave it out or name another data set"),
    (
        batch_beyond_the_set,
        r"The global batch is 25 \(train\.batch_per_worker 25 x 1 workers x train\.accumulation 1\), but the training "
        r"set has 24 samples: lower train\.batch_per_worker or train\.accumulation, or start fewer ranks\.",
    ),
    (
        more_workers_than_ranks,
        r"parallel\.virtual_workers is 3, but this job has 1 ranks .*: start 3 ranks, or .*",
    ),
    (no_gpu, r"train\.device is cuda, but torch sees no GPU: set train\.device=cpu, or see `hpctrain doctor`"),
]


def recipe_on(folder: Path, path: Path) -> Path:
    data = {"loader": "torch", "path": str(folder), "num_classes": None, "image_size": 8, "channels": 3}
    return write_recipe(path, data=data)


def set_args(keys: Keys) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"{key}={value}")]


def is_refused(argv: list[str | Path], sentence: str) -> None:
    done = command(*argv)
    assert done.code == 2, done.err
    assert re.fullmatch(f"hpctrain: {sentence}\n", done.err), done.err
    assert "Traceback" not in done.out


@pytest.mark.parametrize(("prepare", "sentence"), TABLE, ids=[prepare.__name__ for prepare, _ in TABLE])
def test_data(tmp_path: Path, prepare: Callable[[Path], Keys], sentence: str) -> None:
    folder = tmp_path / "set"
    keys = prepare(folder)
    before = tree(folder)
    argv = ["train", recipe_on(folder, tmp_path / "small.yaml"), *set_args(keys), "--run-dir", tmp_path / "run"]
    is_refused(argv, sentence.format(re.escape(str(folder))))
    assert tree(folder) == before
    assert not (tmp_path / "run/record.json").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("- a\n- b\n", r"{} must hold `key: value` lines, but its top level is a list\."),
        ("", r"{} is empty: it needs at least `model: \{{name: \.\.\.\}}` or `extends: FILE`\."),
        ("model: {name: dense", r"{} is not valid YAML: .*"),
        ("model: {name: dense}\ntrian: {epochs: 3}\n", r"trian \({}\) is an unknown key; did you mean train\?"),
        ("model: {name: dense, neuron: 3}\n", r"model\.neuron \({}\) is an unknown key; did you mean model\.neurons\?"),
        ("model: {name: dense}\ndata: {loader: dalli}\n", r"data\.loader is \"dalli\" \({}\), but must be 'auto', .*"),
        ("model: {name: dense}\ncomm: {engine: gloo}\n", r"comm\.engine is \"gloo\" \({}\), but must be 'auto', .*"),
        ("model: {name: dense}\ntrain: {epochs: -1}\n", r"train\.epochs is -1 \({}\), but must be .*"),
    ],
    ids=["list", "empty", "not YAML", "section", "key", "loader", "engine", "value"],
)
def test_configuration(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    is_refused(["train", path, "--run-dir", tmp_path / "run"], sentence.format(re.escape(str(path))))
    assert not (tmp_path / "run").exists(), "nothing is begun before the configuration is understood"


def test_an_engine_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.torch", None)
    path = write_recipe(tmp_path / "small.yaml", comm={"engine": "horovod"})
    is_refused(["train", path], r"the horovod engine does not work here \(.*\): .*make horovod.*; available: .*serial")


def test_a_loader_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    path = recipe_on(pictures(tmp_path / "set"), tmp_path / "small.yaml")
    argv = ["train", path, "--run-dir", tmp_path / "run", "--set", "data.loader=dali"]
    is_refused(argv, r"data\.loader=dali does not work here: .*; pip install nvidia-dali-cuda1\d0, or set .*")


def test_a_run_directory_in_use(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path / "run")
    first.open()
    try:
        is_refused(
            ["train", write_recipe(tmp_path / "small.yaml"), "--run-dir", tmp_path / "run"],
            rf"run directory {tmp_path}/run is in use by process {os.getpid()} on host \S+; wait for that job or give "
            "another --run-dir",
        )
    finally:
        first.close()


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    is_refused(
        ["train", write_recipe(tmp_path / "small.yaml"), "--run-dir", tmp_path / "file/run"],
        rf"cannot write to the run directory {tmp_path}/file/run \(not a directory\); give a writable one with --run.*",
    )


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    path = write_recipe(tmp_path / "small.yaml")
    monkeypatch.setattr(os, "mkdir", refuse)  # root may write where others may not
    reason = os.strerror(number).lower()
    is_refused(
        ["train", path, "--run-dir", tmp_path / "runs/mine"],
        rf"cannot write to the run directory .*/runs/mine \({reason}\); give a writable one with --run-dir",
    )


@pytest.mark.parametrize(
    ("spoil", "argv", "sentence"),
    [
        (
            "model.safetensors",
            [],
            r"none of the 1 checkpoints in {}/checkpoints can be used \(.*has 20 bytes instead .*",
        ),
        ("manifest.json", [], r"none of the 1 checkpoints in {}/checkpoints can be used \(.*is not JSON; .*"),
        (
            None,
            ["--set", "model.neurons=9"],
            r"the checkpoint of step 3 is of another model \(.*",
        ),
        (
            None,
            ["--resume", "never"],
            r"{} already holds a run; continue it with --resume auto or give .*",
        ),
        (
            None,
            ["--resume", "/none"],
            r"/none is neither a checkpoint nor a run directory with one; name .*",
        ),
    ],
    ids=["truncated", "no manifest", "another model", "never", "nothing there"],
)
def test_checkpoints(tmp_path: Path, spoil: str | None, argv: list[str], sentence: str) -> None:
    run = tmp_path / "run"
    run_here(small_recipe(train={"max_steps": 3}), run)
    if spoil:
        os.truncate(run / "checkpoints/step-000003" / spoil, 20)
    path = write_recipe(tmp_path / "small.yaml", train={"max_steps": 6})
    is_refused(["train", path, "--run-dir", run, *argv], sentence.format(re.escape(str(run))))
    assert (run / "checkpoints/step-000003").exists()


def test_going_on_from_another_run_needs_a_new_directory(tmp_path: Path) -> None:
    """Else the checkpoints and logs of two runs would lie in one directory."""
    for name in ("one", "other"):
        run_here(small_recipe(train={"max_steps": 3}), tmp_path / name)
    path = write_recipe(tmp_path / "small.yaml", train={"max_steps": 6})
    argv = ["train", path, "--run-dir", tmp_path / "one", "--resume", tmp_path / "other"]
    is_refused(argv, rf"{re.escape(str(tmp_path / 'one'))} already holds a run; continue it with --resume auto .*")
    run_here(small_recipe(train={"max_steps": 6}), tmp_path / "one", resume=str(tmp_path / "one"))
    run_here(small_recipe(train={"max_steps": 6}), tmp_path / "new", resume=str(tmp_path / "other"))
    assert (tmp_path / "new/checkpoints/step-000006").exists()


def test_a_world_size_that_does_not_divide_the_set_is_told_in_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 pictures on 5 ranks x 2: two steps of ten, four left out or six taken twice."""
    path = recipe_on(pictures(tmp_path / "set"), tmp_path / "small.yaml")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "5")
    for last_batch, told in (("drop", "24 (4 dropped an epoch)"), ("pad", "24 (6 padded an epoch)")):
        keys = {"train.batch_per_worker": 2, "train.last_batch": last_batch}
        done = command("train", path, "--dry-run", *set_args(keys))
        assert done.code == 0 and told in done.out, done


PAIR = Ranks("horovod", "mpirun", 2)


@pytest.mark.parametrize("fault", ["configuration", "data", "checkpoint"])
def test_two_ranks_tell_it_once(tmp_path: Path, fault: str) -> None:
    """Found before ranks can talk, by rank 0 for all, or by each of them."""
    needs("mpi4py")
    run, path = tmp_path / "run", write_recipe(tmp_path / "small.yaml", train={"batch_per_worker": 4})
    if fault == "configuration":
        argv, told = ["--set", "trian.epochs=3"], "trian (--set trian.epochs=3) is an unknown key; did you mean train?"
    elif fault == "data":
        argv = ["--set", "data.loader=torch", "--set", f"data.path={tmp_path / 'none'}"]
        told = f"the data folder {tmp_path / 'none'} does not exist: set data.path to a packed or image folder"
    else:
        run_here(small_recipe(train={"max_steps": 3}), run)
        argv, told = ["--set", "model.neurons=9"], "the checkpoint of step 3 is of another model"
    done = hpctrain(PAIR, "train", path, "--run-dir", run, *argv)
    assert done.returncode == 2, done.output
    assert done.survivors == 0
    assert done.output.count(told) == 1, done.output
    assert done.output.count("hpctrain: ") == 1
    assert "Traceback" not in done.output
