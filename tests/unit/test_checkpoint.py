"""Checkpoints: whole or absent, whatever happens while one is written."""

from __future__ import annotations

import errno
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.layout import list_checkpoints
from hpctrain.train import checkpoint as module
from hpctrain.train.checkpoint import Checkpoint, load_checkpoint, save_checkpoint


def example(step: int) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(8, 3, 3, 3, generator=generator).to(memory_format=torch.channels_last)
    model = {"conv.weight": weight, "bn.num_batches_tracked": torch.tensor(step)}
    return Checkpoint(step, {"model": model, "optimizer": {}}, {"progress": {"step": step}, "lr": 0.1})


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    assert (one.step, one.numbers) == (other.step, other.numbers)
    assert one.tensors.keys() == other.tensors.keys()
    for group, tensors in one.tensors.items():
        assert tensors.keys() == other.tensors[group].keys()
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.tensors[group][name])
            assert tensor.dtype == other.tensors[group][name].dtype


def test_round_trip_is_exact(tmp_path: Path) -> None:
    assert_same(load_checkpoint(save_checkpoint(tmp_path, example(7), keep=3)), example(7))


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (5, 10, 100_000, 1_000_000):
        save_checkpoint(tmp_path, example(step), keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-1000000", "step-100000"]


def test_same_step_can_be_saved_again(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, example(5), keep=2)
    (path / "model.safetensors").write_bytes(b"spoilt")
    assert_same(load_checkpoint(save_checkpoint(tmp_path, example(5), keep=2)), example(5))


def test_no_checkpoints_where_there_is_no_folder(tmp_path: Path) -> None:
    assert list_checkpoints(tmp_path / "none") == []


def test_every_byte_is_covered(tmp_path: Path) -> None:
    """One flipped bit anywhere, in tensors or numbers, is noticed."""
    path = save_checkpoint(tmp_path, example(3), keep=1)
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for position in range(0, len(content), 7):
            spoilt = bytearray(content)
            spoilt[position] ^= 1
            file.write_bytes(bytes(spoilt))
            with pytest.raises(UserError, match=r"is not usable: .*; resume from an older one or start a new run"):
                load_checkpoint(path)
        file.write_bytes(content)
    assert_same(load_checkpoint(path), example(3))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: (path / "model.safetensors").unlink(), "model.safetensors cannot be read"),
        (lambda path: os.truncate(path / "model.safetensors", 10), "model.safetensors has 10 bytes instead of"),
        (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
        (lambda path: os.truncate(path / "manifest.json", 10), "manifest.json is not JSON"),
        (lambda path: (path / "manifest.json").write_text("[]"), "manifest.json is not of schema 1"),
    ],
)
def test_says_what_is_wrong(tmp_path: Path, spoil, reason: str) -> None:
    path = save_checkpoint(tmp_path, example(3), keep=1)
    spoil(path)
    with pytest.raises(UserError, match=reason):
        load_checkpoint(path)


def test_altered_number_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, example(3), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["numbers"]["lr"] = 0.2
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json does not match its digest"):
        load_checkpoint(path)


def test_full_disk_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, example(5), keep=1)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MachineError, match=r"cannot write checkpoint .*step-000006: No space left on device"):
        save_checkpoint(tmp_path, example(6), keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000005"]


def save_killed_before_call(folder: Path, calls: int) -> int:
    """Save in a forked process that gets SIGKILL before its ``calls``-th system call; returns its wait status."""
    child = os.fork()
    if child == 0:
        left = [calls]

        def deadly(original):
            def call(*args, **kwargs):
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                return original(*args, **kwargs)

            return call

        for name in ("fsync", "rename", "open", "rmdir", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        save_checkpoint(folder, example(6), keep=1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    """SIGKILL before each system call of a save in turn, until one save gets through."""
    for calls in range(200):
        folder = tmp_path / str(calls)
        save_checkpoint(folder, example(5), keep=1)
        status = save_killed_before_call(folder, calls)
        complete = list_checkpoints(folder)
        assert complete, f"nothing left after a kill before call {calls}"
        assert_same(load_checkpoint(complete[0]), example(int(complete[0].name[5:])))
        if status == 0:
            break
        save_checkpoint(folder, example(7), keep=1)
        assert [path.name for path in folder.iterdir()] == ["step-000007"]
    assert status == 0
    assert calls > 5


def test_schema_is_written(tmp_path: Path) -> None:
    manifest = json.loads((save_checkpoint(tmp_path, example(1), keep=1) / "manifest.json").read_text())
    assert manifest["schema"] == module.SCHEMA
