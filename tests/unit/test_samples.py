"""The sample log: each sample once an epoch, over kills, resumes and other numbers of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.config.schema import Config
from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.jsonfiles import DurableLog, read_log
from hpctrain.metrics.launches import Launch, read_launches
from hpctrain.train.launches import Launches
from hpctrain.train.samples import owner_of_steps, samples_seen
from tests.unit.small_runs import Taken, recipe, record_requests, run_on


def small(batch: int, max_steps: int, **train: object) -> Config:
    """100 samples in steps of 16, six an epoch; a checkpoint every four."""
    return recipe(
        data={"log_samples": True},
        train={"batch_per_worker": batch, "max_steps": max_steps, **train},
        checkpoint={"every_steps": 4},
    )


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    return record_requests(monkeypatch)


def test_a_run_tells_what_it_was_trained_on(tmp_path: Path, taken: Taken) -> None:
    run_on(2, small(8, 12), tmp_path)
    seen = samples_seen(tmp_path)
    for epoch in (0, 1):
        assert np.flatnonzero(seen[epoch]).tolist() == taken.ids(epoch)
        assert seen[epoch].sum() == 96
        assert seen[epoch].max() == 1


def test_steps_done_again_on_fewer_ranks_count_once(tmp_path: Path) -> None:
    """Four ranks go to step 9 and are killed before the checkpoint of step 8 had its name; two go on from 4."""
    run_on(4, small(4, 9), tmp_path)
    for step in (8, 9):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:06d}")
    run_on(2, small(8, 12), tmp_path)
    assert [(launch.step, launch.world_size) for launch in read_launches(tmp_path)] == [(0, 4), (4, 2)]
    steps = [line["step"] for line in read_log(tmp_path / "samples/0.jsonl")]
    assert steps == [*range(9), *range(4, 12)], "both doings are in the log"
    seen = samples_seen(tmp_path)
    assert [(counts.sum(), counts.max()) for counts in seen.values()] == [(96, 1), (96, 1)]


def test_steps_beyond_the_newest_checkpoint_are_no_part_of_the_model(tmp_path: Path) -> None:
    run_on(2, small(8, 10), tmp_path)
    for step in (8, 10):
        shutil.rmtree(tmp_path / f"checkpoints/step-{step:06d}")
    assert sum(counts.sum() for counts in samples_seen(tmp_path).values()) == 4 * 16


def test_padding_is_not_counted(tmp_path: Path) -> None:
    run_on(2, small(8, 7, last_batch="pad"), tmp_path)
    assert samples_seen(tmp_path)[0].tolist() == [1] * 100


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    run_on(2, small(4, 6, accumulation=2), tmp_path)
    assert [len(line["ids"]) for line in read_log(tmp_path / "samples/1.jsonl")] == [8] * 6
    assert samples_seen(tmp_path)[0].max() == 1


def test_a_step_that_nobody_logged_is_an_error(tmp_path: Path) -> None:
    run_on(2, small(8, 4).model_copy(update={"data": recipe().data}), tmp_path)
    run_on(2, small(8, 8), tmp_path)
    with pytest.raises(UserError, match=r"tells of step 1 on 0 of 2 ranks; set data.log_samples=true from the first"):
        samples_seen(tmp_path)
    with pytest.raises(UserError, match="holds no checkpoint; name the folder of a run"):
        samples_seen(tmp_path / "checkpoints")


@given(starts=st.lists(st.integers(0, 30), max_size=6), steps=st.integers(0, 40))
def test_the_last_doing_of_a_step_owns_it(starts: list[int], steps: int) -> None:
    launches = [Launch(number, start, 1, 100) for number, start in enumerate([0, *starts])]
    owners = owner_of_steps(launches, steps)
    assert len(owners) == steps
    for step, owner in enumerate(owners):
        assert owner.number == max(launch.number for launch in launches if launch.step <= step)


def test_a_log_goes_on_after_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "ids": [1, 2')
    assert [line["step"] for line in read_log(path)] == [1]
    log = DurableLog(path)
    log.append({"step": 2})
    log.flush()
    assert [line["step"] for line in read_log(path)] == [1, 2]
    log.close()
    path.write_bytes(b"x" * 200_000)
    DurableLog(path).close()
    assert path.stat().st_size == 0, "one torn line, longer than a block"
    path.write_bytes(b'{"step": 1}\nnothing\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"line 2 of .*log.jsonl is damaged; restore the file from a copy"):
        list(read_log(path))
    with pytest.raises(UserError, match="cannot be read"):
        list(read_log(tmp_path / "none"))


def test_a_full_disk_is_a_fault_of_the_machine(tmp_path: Path) -> None:
    """Linux has a device that is always full."""
    (tmp_path / "full").symlink_to("/dev/full")
    log = DurableLog.__new__(DurableLog)
    log._path, log._stream = tmp_path / "full", (tmp_path / "full").open("ab")
    log.append({"step": 1})
    with pytest.raises(MachineError, match=r"cannot write .*full: No space left on device"):
        log.flush()
    with pytest.raises(MachineError, match="No space left"):
        log.close()
    with pytest.raises(MachineError, match="cannot write"):
        DurableLog(tmp_path / "full" / "below")


def test_launches_are_told_with_their_job(tmp_path: Path) -> None:
    launches = Launches(tmp_path)
    assert read_launches(tmp_path) == []
    assert launches.begin(0, 4, 100, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}) == 0
    launches.end(0, 5, "SIGUSR1 on rank 2 (host n1)", preempted=True, write_s=1.5)
    assert launches.begin(5, 2, 100, {}) == 1
    array = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": "3"}
    assert launches.begin(5, 2, 100, array) == 2
    told = read_launches(tmp_path)
    assert told == [
        Launch(0, 0, 4, 100, job="7", slurm_restarts=1, ended=True, preempted=True, write_s=1.5),
        Launch(1, 5, 2, 100),
        Launch(2, 5, 2, 100, job="12", array="9", task=3),
    ]
