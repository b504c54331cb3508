"""The torch engine where no peer is needed: its flight recorder, seen by a stand-in, and its threads' end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hpctrain.comm.torch_engine import TorchCommunicator
from hpctrain.topology.ranks import Topology


def comm_on(device: str) -> TorchCommunicator:
    """Rank 1 of a group of ranks 4 and 6 of the world, without the group."""
    comm = object.__new__(TorchCommunicator)
    comm.device, comm.topology, comm._world_ranks = torch.device(device), Topology(1, 2), [4, 6]
    return comm


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Torch's recorder of NCCL, which this torch may lack; where its files are to be."""
    monkeypatch.setattr(torch._C._distributed_c10d, "_dump_nccl_trace", lambda: b"collectives", raising=False)
    monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")
    monkeypatch.setenv("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", f"{tmp_path}/nccl/rank-")
    return tmp_path / "nccl"


def test_the_flight_recorder_is_written_under_torchs_own_name(recorder: Path) -> None:
    path = comm_on("cuda").dump_trace()
    assert path == recorder / "rank-6"
    assert path.read_bytes() == b"collectives"


@pytest.mark.parametrize(("device", "size"), [("cpu", "2000"), ("cuda", "0"), ("cuda", None)])
def test_nothing_is_written_where_nothing_is_recorded(
    recorder: Path, monkeypatch: pytest.MonkeyPatch, device: str, size: str | None
) -> None:
    if size is None:
        monkeypatch.delenv("TORCH_NCCL_TRACE_BUFFER_SIZE")
    else:
        monkeypatch.setenv("TORCH_NCCL_TRACE_BUFFER_SIZE", size)
    assert comm_on(device).dump_trace() is None
    assert not recorder.exists()


_TRAIN_AND_LEAVE = """
import os, torch
from hpctrain.comm.torch_engine import boot
from hpctrain.topology.ranks import Topology

torch.set_num_threads(1)
before = len(os.listdir("/proc/self/task"))
comm = boot(Topology(), torch.device("cpu"), 30.0)
model = torch.nn.Linear(2, 2)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert len(os.listdir("/proc/self/task")) > before
comm.close()
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.timeout(100)
def test_gloos_threads_end_with_the_group_though_an_optimizer_was_made() -> None:
    done = subprocess.run([sys.executable, "-c", _TRAIN_AND_LEAVE], capture_output=True, text=True, timeout=90)
    assert int(done.stdout) <= 1, (done.stdout, done.stderr)
