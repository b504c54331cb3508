"""Runs that meet a fault, an interrupt, a full disk or spoilt pictures: how they end, and what they leave."""

from __future__ import annotations

import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.integration.commands import LIMIT_S, Job, Ranks, hpctrain, train, train_argv, write_config
from tests.needs import needs
from tests.parallel.launch import launch
from tests.unit.small_runs import command, record_of, saved_steps

pytestmark = pytest.mark.timeout(600)

ALONE = Ranks("serial", "plain", 1)
PAIRS = [Ranks("horovod", "horovodrun", 2), Ranks("mpi", "mpirun", 2), Ranks("torch", "torchrun", 2)]


@pytest.fixture(scope="module")
def config(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of hours, unless something stops it."""
    return write_config(
        tmp_path_factory.mktemp("config") / "long.yaml",
        model={"name": "dense", "neurons": 200},
        data={"path": str(digits), "loader": "torch", "threads": 1, "image_size": 8, "channels": 1, "flip": False},
        train={"epochs": 100_000, "batch_per_worker": 16},
        schedule={"kind": "constant", "lr": 0.01},
        checkpoint={"every_steps": 10},
        log={"every_steps": 5, "tensorboard": False},
    )


@pytest.mark.parametrize("ranks", [*PAIRS, ALONE], ids=str)
def test_ctrl_c_ends_all_ranks_soon_and_quietly(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with Job(ranks, *train_argv(ranks, config, run)) as job:
        job.wait_until((run / "checkpoints/step-000020").exists)
        started = time.monotonic()
        job.interrupt()
        done = job.end()
    assert time.monotonic() - started < 30, done.output[-6000:]
    assert done.survivors == 0
    assert done.returncode not in (0, None)
    assert not (run / "record.json").exists()
    # torchrun tells of its own end with a traceback; the ranks have none.
    assert done.output.count("Traceback") <= (ranks.launcher == "torchrun"), done.output[-6000:]
    if ranks.count == 1:
        assert done.returncode == 130
    newest = saved_steps(run)[-1]
    sets = (f"train.max_steps={newest + 1}", f"train.accumulation={ranks.count}")
    again = command(*train_argv(ALONE, config, run, *sets))
    assert again.code == 0, again.err
    assert f"going on from step {newest}" in again.out


@pytest.mark.parametrize("ranks", PAIRS[:2], ids=str)
def test_an_exception_on_one_rank_ends_the_job_and_is_told_first(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    through = ("tests/integration/driver.py", "1", "12")
    done = hpctrain(ranks, *train_argv(ranks, config, run), through=through)
    assert not done.timed_out and done.survivors == 0
    assert done.returncode not in (0, None)
    assert done.output.count("Traceback (most recent call last)") == 1, done.output[-6000:]
    assert "ZeroDivisionError: a fault of the program" in done.output
    first = next(line for line in done.output.splitlines() if "[rank 1 on host" in line or "Traceback" in line)
    assert re.search(r"\[rank 1 on host \S+, step 12, phase data\]$", first), first
    ended = [path.stat().st_mtime for path in (run / "checkpoints").iterdir()]
    assert saved_steps(run) == [10]
    assert time.time() - max(ended) < 30 + 5, "from the last checkpoint to the end"


def test_a_full_disk_during_a_save_loses_nothing(config: Path, tmp_path: Path) -> None:
    """As a limit on the size of files has it, which a checkpoint of this net exceeds and the logs do not."""
    sets = ("train.max_steps=20",)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert command(*train_argv(ALONE, config, whole, *sets)).code == 0
    assert command(*train_argv(ALONE, config, run, "train.max_steps=10")).code == 0
    argv = [sys.executable, "-m", "hpctrain", *train_argv(ALONE, config, run, *sets)]
    done = launch("plain", 1, ["bash", "-c", 'ulimit -f 30; exec "$@"', "bash", *argv], LIMIT_S)
    assert done.returncode == 1, done.output
    assert done.output.splitlines()[-1] == (
        f"hpctrain: cannot write checkpoint {run}/checkpoints/step-000020: File too large; make room and continue with "
        f"--run-dir {run}"
    )
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000010"]
    assert command(*train_argv(ALONE, config, run, *sets)).code == 0
    assert record_of(run)["parameters_sha256"] == record_of(whole)["parameters_sha256"]


def test_a_run_that_diverges_ends_with_2_on_two_ranks(config: Path, tmp_path: Path) -> None:
    run, ranks = tmp_path / "run", PAIRS[1]
    train(ranks, config, run, "train.max_steps=10")
    done = hpctrain(ranks, *train_argv(ranks, config, run, "schedule.lr=1e15", "train.max_steps=40"))
    assert done.returncode == 2
    assert done.output.count("became NaN or infinite") == 1, done.output
    assert "Traceback" not in done.output
    assert saved_steps(run) == [10]
    assert not (run / "record.json").exists()


@pytest.fixture(scope="module")
def spoilt(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The digits with two spoilt after packing: one without its end, one without its tables. And their names."""
    from hpctrain.data.manifest import open_packed

    folder = shutil.copytree(digits, tmp_path_factory.mktemp("spoilt") / "digits")
    index = open_packed(folder)["train"]
    for sample_id in (100, 900):
        record = index.samples[sample_id]
        offset, length = int(record["offset"]), int(record["length"])
        with open(index.shards[record["shard"]], "r+b") as shard:
            shard.seek(offset)
            data = shard.read(length)
            end = length - 40, length
            tables = data.index(b"\xff\xc4") + 4, data.rindex(b"\xff\xda")
            start, stop = end if sample_id == 100 else tables
            shard.seek(offset + start)
            shard.write(bytes(stop - start))
    return folder, [index.name(sample_id) for sample_id in (100, 900)]


@pytest.mark.parametrize(("loader", "ranks"), [("dali", PAIRS[0]), ("torch", PAIRS[2])], ids=["dali", "torch"])
def test_corrupt_pictures_at_run_time(
    loader: str, ranks: Ranks, config: Path, spoilt: tuple[Path, list[str]], tmp_path: Path
) -> None:
    """The run goes on, with its ranks in step, counts them and names them; or stops when that is too many."""
    if loader == "dali":
        needs("nvidia.dali")
    folder, names = spoilt
    sets = [f"data.path={folder}", f"data.loader={loader}", "train.epochs=1", "train.last_batch=pad"]
    done = train(ranks, config, tmp_path / "run", *sets, "data.max_corrupt_share=0.002")
    data = record_of(tmp_path / "run")["data"]
    assert data["corrupt_skipped"] == 2
    assert sorted(line.split(": ")[0] for line in data["corrupt"]) == sorted(names)
    assert data["samples_seen"] == 1438
    assert all(done.output.count(f"{name}: ") == 1 for name in names), "each is told once"


@pytest.mark.parametrize("loader", ["dali", "torch"])
def test_too_many_corrupt_pictures(loader: str, config: Path, spoilt: tuple[Path, list[str]], tmp_path: Path) -> None:
    if loader == "dali":
        needs("nvidia.dali")
    folder, names = spoilt
    sets = [f"data.path={folder}", f"data.loader={loader}", "train.epochs=2", "data.max_corrupt_share=0.001"]
    done = command(*train_argv(ALONE, config, tmp_path / "run", *sets))
    assert done.code == 2
    (sentence,) = done.err.splitlines()
    # Of the part that is read, or of both when the log counts them before the batch is due that the loader stops at.
    assert re.match(
        r"hpctrain: 2 of (1438 samples \(0\.14%\)|1797 samples \(0\.11%\)) cannot be decoded, "
        r"more than data\.max_corrupt_share = 0\.10% allows",
        sentence,
    )
    assert any(name in sentence for name in names)
    assert sentence.endswith(f"run `hpctrain data verify {folder}` to list them all")
    verified = command("data", "verify", folder, "--jobs", "1")
    assert verified.code == 1
    assert all(name in verified.out for name in names)
