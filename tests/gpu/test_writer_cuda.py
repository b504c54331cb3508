"""Checkpoints of tensors on a GPU, written while the stream goes on to change them."""

from __future__ import annotations

from pathlib import Path

import torch

from hpctrain.train.checkpoint import Checkpoint, save_checkpoint
from hpctrain.train.writer import CheckpointWriter
from tests.needs import needs_gpu

needs_gpu()


def test_the_copy_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    weight = torch.randn(1 << 22, device="cuda").view(64, 64, 32, 32).to(memory_format=torch.channels_last)
    tensors = {"model": {"weight": weight, "count": torch.tensor(3)}}
    writer = CheckpointWriter(tmp_path / "beside", keep=2)
    for step in (1, 2):
        weight.mul_(1.5)
        expected = save_checkpoint(tmp_path / "here", Checkpoint(step, tensors, {}), keep=2)
        writer.start(Checkpoint(step, tensors, {}))
        for _ in range(100):
            weight.add_(1.0)
        assert writer.finished(60)
        for file in sorted(expected.iterdir()):
            assert (tmp_path / "beside" / expected.name / file.name).read_bytes() == file.read_bytes()
