"""Checkpoints beside the steps: the same file as a synchronous one, one at a time, and a failure that is told."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import MachineError, UserError
from hpctrain.train import loop as loop_module
from hpctrain.train import writer as module
from hpctrain.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from hpctrain.train.interval import best_interval_s, interval_steps
from hpctrain.train.rundir import RunDirectory
from hpctrain.train.saver import Saver
from hpctrain.train.writer import CheckpointWriter
from tests.unit.small_runs import parts_of, recipe, record_of, run_here, run_on, saved_steps


def example(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    model = {"conv.weight": weight, "half": torch.ones(3, dtype=torch.bfloat16), "count": torch.tensor(step)}
    return Checkpoint(step, {"model": model, "optimizer": {}}, {"progress": {"step": step}})


def test_the_file_is_the_one_a_synchronous_save_writes(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "beside", keep=5)
    for step in (3, 7):
        checkpoint = example(step)
        expected = save_checkpoint(tmp_path / "here", example(step), keep=5)
        writer.start(checkpoint)
        for tensor in checkpoint.tensors["model"].values():
            tensor.zero_()  # the next step has begun
        checkpoint.numbers["progress"]["step"] = 1000
        assert writer.finished(60)
        written = tmp_path / "beside" / expected.name
        for file in sorted(expected.iterdir()):
            assert (written / file.name).read_bytes() == file.read_bytes()
            assert (written / file.name).stat().st_mode == (tmp_path / "beside").stat().st_mode & 0o666 | 0o100000
    assert len(writer.write_s) == 2


def slow_save(monkeypatch: pytest.MonkeyPatch, before: Callable[[], Any]) -> None:
    def save(*args: Any) -> Path:
        before()
        return save_checkpoint(*args)

    monkeypatch.setattr(module, "save_checkpoint", save)


def test_steps_go_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write of step 10 waits for step 15, which the run must reach by itself."""
    reached = threading.Event()
    slow_save(monkeypatch, lambda: reached.wait(60))
    original = loop_module.train_step

    def step(parts: Any, batches: Any, number: int) -> torch.Tensor:
        if number == 15:
            assert saved_steps(tmp_path) == []
            reached.set()
        return original(parts, batches, number)

    monkeypatch.setattr(loop_module, "train_step", step)
    costs = run_here(recipe(train={"max_steps": 20}), tmp_path)["launch"]["checkpoint"]
    assert saved_steps(tmp_path) == [10, 20], "the run waited for its last one"
    assert costs["every_s"] is not None
    assert costs["exposed_s"] > 0
    assert costs["write_s"] > 0


def test_one_write_at_a_time_and_signs_of_life_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a write takes, no rank is late: each enters the phase again and again."""
    monkeypatch.setattr("hpctrain.train.saver._LOOK_S", 0.01)
    under_way: list[int] = []
    most: list[int] = []
    release = threading.Event()

    def before() -> None:
        under_way.append(1)
        most.append(len(under_way))
        release.wait(60)
        under_way.pop()

    slow_save(monkeypatch, before)
    parts = parts_of(recipe())
    entered: list[str] = []
    saver = Saver(parts, tmp_path, 0)

    def enter(phase: str) -> None:
        entered.append(phase)
        if len(entered) == 5:
            release.set()

    object.__setattr__(parts, "clock", SimpleNamespace(enter=enter))
    progress: Any = SimpleNamespace(step=1, to_numbers=lambda: {})
    saver.save(progress)
    assert entered == [], "the first is written beside the steps"
    progress.step = 2
    saver.save(progress)
    saver.wait()
    assert len(entered) >= 5
    assert set(most) == {1}
    assert saver.to_record()["every_s"] is not None


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_full_disk_ends_the_run_at_the_next_save(
    world_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []

    def full() -> None:
        calls.append(1)
        raise MachineError("cannot write checkpoint x: No space left on device")

    slow_save(monkeypatch, full)
    config = recipe(train={"max_steps": 30, "batch_per_worker": 8 // world_size})
    with pytest.raises(MachineError, match="cannot write checkpoint x: No space left on device"):
        run_on(world_size, config, tmp_path)
    assert calls == [1], "steps 11 to 20 were taken, and the save after them told"


def test_an_error_leaves_the_directory_locked_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the next start would take it, and two would write there."""
    monkeypatch.setattr("hpctrain.train.saver._PATIENCE_S", 0.0)
    monkeypatch.setattr("hpctrain.train.rundir._PATIENCE_S", 0.0)
    release = threading.Event()
    slow_save(monkeypatch, lambda: release.wait(60))
    original = loop_module.train_step

    def step(parts: Any, batches: Any, number: int) -> torch.Tensor:
        if number == 15:
            raise MachineError("a device has failed")
        return original(parts, batches, number)

    monkeypatch.setattr(loop_module, "train_step", step)
    with pytest.raises(MachineError, match="a device has failed"):
        run_here(recipe(), tmp_path / "run")
    with pytest.raises(UserError, match="is in use by process"):
        RunDirectory(tmp_path / "run").open()
    release.set()
    with pytest.raises(MachineError, match="a device has failed"):
        run_here(recipe(checkpoint={"every_steps": 100}), tmp_path / "free")
    free = RunDirectory(tmp_path / "free")
    assert free.open(), "nothing was being written there"
    free.close()


def test_a_failed_last_write_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hpctrain.train.checkpoint.os.fsync", full)
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.start(example(5))
    with pytest.raises(MachineError, match=r"cannot write checkpoint .*step-000005: No space left on device"):
        writer.finished(60)
    assert writer.finished(0), "told once"


def test_any_other_failure_of_the_thread_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_save(monkeypatch, lambda: [][1])
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.start(example(5))
    with pytest.raises(MachineError, match=r"writing the checkpoint of step 5 failed: IndexError"):
        writer.finished(60)


def test_what_safetensors_reports_is_told_in_the_systems_words(tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before := resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        with pytest.raises(MachineError, match=r"cannot write checkpoint .*/step-000005: File too large; make room"):
            save_checkpoint(tmp_path, example(5), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, before))
    assert list(tmp_path.iterdir()) == []
    blocked = tmp_path / "checkpoints"
    blocked.write_text("not a folder")
    with pytest.raises(MachineError, match=r"cannot write checkpoint .*checkpoints/step-000005: File exists"):
        save_checkpoint(blocked, example(5), keep=1)


@given(cost_s=st.floats(1e-3, 1e3), mtbf_s=st.floats(1e4, 1e8))
def test_the_interval_loses_least(cost_s: float, mtbf_s: float) -> None:
    """Of a first-order loss: cost / interval for saving, interval / 2 MTBF for what is done again."""

    def loss(interval_s: float) -> float:
        return cost_s / interval_s + interval_s / (2 * mtbf_s)

    best_s = best_interval_s(cost_s, mtbf_s)
    assert loss(best_s) <= min(loss(best_s * 1.1), loss(best_s / 1.1))


def test_the_interval_in_steps() -> None:
    assert best_interval_s(2.0, 3600.0) == 120.0
    assert interval_steps(2.0, 1.0, 3600.0, 0.5) == 240
    assert interval_steps(2.0, 300.0, 3600.0, 0.5) == 600, "not before the last one is written"
    assert interval_steps(1e-9, 0.0, 1.0, 60.0) == 1


def test_the_interval_follows_from_the_cost_on_all_ranks(tmp_path: Path) -> None:
    """A failure every second of this run: the first checkpoint measures, the next come as often as pays."""
    config = recipe(
        train={"batch_per_worker": 4, "max_steps": 40, "eval_every_epochs": None},
        checkpoint={"every_steps": None, "mtbf_hours": 1e-9},
        log={"every_steps": 4},
    )
    run_on(2, config, tmp_path)
    steps = saved_steps(tmp_path)
    assert steps[0] == 4
    assert steps[-1] == 40
    assert len(steps) > 2
    assert record_of(tmp_path)["steps"] == 40
    for path in sorted((tmp_path / "checkpoints").iterdir()):
        load_checkpoint(path)
