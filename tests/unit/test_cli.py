"""What can be typed: light help, exit codes, one sentence for an error, and the commands on small sets."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain import __version__
from tests.needs import needs
from tests.unit.image_folders import image_folder
from tests.unit.small_runs import command, write_recipe

HEAVY = ("torch", "numpy", "hpctrain.config", "yaml", "PIL", "psutil", "matplotlib", "horovod", "mpi4py", "nvidia")


@pytest.mark.parametrize("argv", [["--help"], ["train", "--help"], ["data", "pack", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    """It answers in 0.3 s for that reason alone."""
    code = (
        f"import sys; sys.argv = ['hpctrain', *{argv!r}]\n"
        "from hpctrain.cli import main\n"
        "try:\n    main()\nexcept SystemExit as leave:\n    assert not leave.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_the_commands_are_those_of_the_readme() -> None:
    shown = command("--help").out + command("data", "--help").out + command("bench", "--help").out
    for name in ("train", "eval", "doctor", "data", "bench", "pack", "verify", "digits", "step"):
        assert f" {name} " in shown


def test_version() -> None:
    assert command("--version").out.strip() == __version__


@pytest.mark.parametrize("argv", [["trian"], ["train"], ["train", "x.yaml", "--no-such-option"], ["data", "pack", "a"]])
def test_what_cannot_be_parsed_is_a_usage_error(argv: list[str]) -> None:
    done = command(*argv)
    assert done.code == 2
    assert "Usage" in done.err and "Traceback" not in done.err


def test_an_error_is_one_sentence_on_stderr(tmp_path: Path) -> None:
    done = command("train", tmp_path / "none.yaml")
    assert (done.code, done.out) == (2, "")
    assert done.err == f"hpctrain: There is no configuration file {tmp_path / 'none.yaml'}.\n"


def test_set_changes_a_key_and_is_repeatable(tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "small.yaml")
    sets = ["--set", "train.max_steps=3", "--set", "train.batch_per_worker=10"]
    assert command("train", config, *sets, "--run-dir", tmp_path / "run").code == 0
    plan = json.loads((tmp_path / "run/record.json").read_text())["plan"]
    assert (plan["total_steps"], plan["batch_global"]) == (3, 10)


def test_dry_run_prints_the_plan_and_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = write_recipe(tmp_path / "small.yaml", schedule={"kind": "cosine", "lr": 0.4, "warmup_epochs": 1})
    before = sorted(tmp_path.iterdir())
    done = command("train", config, "--dry-run")
    assert (done.code, done.err, sorted(tmp_path.iterdir())) == (0, "", before)
    rows = dict(re.split(r" {2,}", row.strip()) for row in done.out.splitlines())
    assert rows["ranks"] == "1"
    assert rows["training samples"] == "100 (4 dropped an epoch)"
    assert rows["total steps"] == "48 (4 epochs)"
    assert rows["learning rate at start, peak, end"].startswith("0, 0.4, ")


def test_dry_run_under_a_launcher_is_told_once_and_for_its_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_recipe(tmp_path / "small.yaml")
    monkeypatch.setenv("WORLD_SIZE", "3")
    outputs = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        done = command("train", config, "--dry-run")
        assert done.code == 0
        outputs.append(done.out)
    assert "global batch                       24" in outputs[0]
    assert outputs[1:] == ["", ""]


def test_dry_run_finds_what_cannot_work(tmp_path: Path) -> None:
    config = write_recipe(tmp_path / "small.yaml", train={"batch_per_worker": 101})
    done = command("train", config, "--dry-run")
    assert (done.code, done.out) == (2, "")
    assert "The global batch is 101" in done.err


def test_pack_then_verify(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", {"train": 4, "val": 2})
    packed = tmp_path / "packed"
    done = command("data", "pack", source, packed, "--shard-mb", "1")
    assert done.code == 0
    assert "12 train and 6 val pictures of 3 classes" in done.out
    done = command("data", "verify", packed, "--jobs", "1", "--json", tmp_path / "report.json")
    assert done.code == 0 and "no problems" in done.out
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["ok"], report["pictures"]) == (True, 18)


def test_verify_of_a_spoilt_set_exits_with_1_and_names_the_file(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "source", {"train": 4, "val": 2})
    bad = source / "train/bee/bee1.jpg"
    bad.write_bytes(bad.read_bytes()[:-30])
    done = command("data", "verify", source, "--jobs", "1")
    assert done.code == 1
    assert str(bad) in done.out


def test_digits_are_packed_once(tmp_path: Path) -> None:
    needs("sklearn")
    first, second = (command("data", "digits", tmp_path / "digits") for _ in range(2))
    assert (first.code, second.code) == (0, 0)
    assert "1,438 train and 359 val pictures of 10 classes" in first.out
    assert "0 packed now" in second.out


def test_ilsvrc_wants_three_archives(tmp_path: Path) -> None:
    done = command("data", "pack", "--ilsvrc", tmp_path / "train.tar", tmp_path / "out")
    assert done.code == 2
    assert "--ilsvrc takes TRAIN.tar VAL.tar DEVKIT.tar.gz and the destination" in done.err


@pytest.mark.parametrize("asked", ["verify", "eval"])
def test_a_report_that_cannot_be_written_is_told(tmp_path: Path, asked: str) -> None:
    if asked == "verify":
        argv = ["data", "verify", image_folder(tmp_path / "source", {"train": 2, "val": 1})]
    else:
        config = write_recipe(tmp_path / "small.yaml", train={"max_steps": 2})
        assert command("train", config, "--run-dir", tmp_path / "run").code == 0
        argv = ["eval", tmp_path / "run"]
    done = command(*argv, "--json", tmp_path / "none" / "report.json")
    assert done.code == 1
    assert done.err.startswith(f"hpctrain: cannot write {tmp_path}/none/report.json: No such file or directory; ")
