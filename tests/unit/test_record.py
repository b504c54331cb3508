"""The record of a run: complete or refused, whole or absent; and the digest of parameters."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from hpctrain.errors import MachineError, UserError
from hpctrain.metrics.record import parameters_sha256, read_record, write_record

RECORD: dict[str, Any] = {
    "config_hash": "abc",
    "plan": {
        "world_size": 2, "nodes": 1, "workers": 2, "batch_per_worker": 32, "batch_global": 64, "steps_per_epoch": 10,
        "epochs": 3, "lr_peak": 0.4,
    },
    "throughput": {"images_per_s": {"median": 812.0, "p5": 700.0, "p95": 900.0, "mean": 800.0}, "warmup_rule": "…"},
    "accuracy": {"top1": 0.97, "top5": 1.0, "seen": 360},
    "phases_s": {"data": 0.01, "forward": 0.1, "backward": 0.2, "exposed_comm": 0.005, "optimizer": 0.01},
    "data": {"loader": "dali", "real": True, "samples_seen": 1920, "corrupt_skipped": 0},
    "wire": {"dtype": "fp32", "bytes_per_step": 4000, "overflow": 0, "underflow": 0},
    "engine": {"name": "horovod", "version": "0.28.1"},
    "ranks": [
        {"rank": 0, "host": "n1", "local_rank": 0, "data_s": 0.01, "forward_s": 0.1, "corrupt_skipped": 0},
        {"rank": 1, "host": "n1", "local_rank": 1, "data_s": 0.01, "forward_s": 0.1, "corrupt_skipped": 0},
    ],
    "parameters_sha256": "0" * 64,
    "provenance": {"python": "3.11"},
    "system": {"memory_slope_bytes_per_step": 12.5},
}  # fmt: skip


def test_round_trip_keeps_stable_and_further_keys(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_record(path, RECORD)
    assert json.loads(path.read_text()) == {"schema": 1, **RECORD}
    record = read_record(path)
    assert record.plan.batch_global == 64
    assert record.throughput.images_per_s.median == 812.0
    assert record.model_extra == {"system": {"memory_slope_bytes_per_step": 12.5}}


def test_figures_a_run_lacks_are_null(tmp_path: Path) -> None:
    record = copy.deepcopy(RECORD)
    record["throughput"]["images_per_s"]["median"] = float("nan")
    record["phases_s"]["data"] = float("inf")
    record["accuracy"] = {"top1": None, "top5": None, "seen": 0}
    write_record(tmp_path / "record.json", record)
    read = read_record(tmp_path / "record.json")
    assert (read.throughput.images_per_s.median, read.phases_s.data, read.accuracy.top1) == (None, None, None)


@pytest.mark.parametrize("section", [name for name in RECORD if name != "system"])
def test_incomplete_record_is_not_written(tmp_path: Path, section: str) -> None:
    record = {name: value for name, value in RECORD.items() if name != section}
    with pytest.raises(ValidationError, match=section):
        write_record(tmp_path / "record.json", record)
    assert not list(tmp_path.iterdir())


def test_accuracy_is_a_fraction(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="top1"):
        write_record(tmp_path / "record.json", {**RECORD, "accuracy": {"top1": 97.0, "top5": 1.0, "seen": 1}})


def test_record_that_cannot_be_written_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot write .*record\.json"):
        write_record(tmp_path / "gone" / "record.json", RECORD)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"record\.json cannot be read \(No such file or directory\); name the folder of a run that has ended"),
        ("{", r"record\.json is not JSON .*; restore it"),
        ('{"schema": 2}', r"record\.json is no record of this version: schema: .*; run it again"),
    ],
)
def test_unreadable_record_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "record.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_record(path)


def test_records_are_read_without_torch(tmp_path: Path) -> None:
    write_record(tmp_path / "record.json", RECORD)
    program = (
        "import sys; from pathlib import Path; from hpctrain.metrics.record import read_record\n"
        "assert read_record(Path(sys.argv[1])).plan.nodes == 1; assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", program, str(tmp_path / "record.json")]
    subprocess.run(command, cwd=root, timeout=120, check=True)


@settings(deadline=None, max_examples=30)
@given(
    shape=st.tuples(*[st.integers(1, 4)] * 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]),
)
def test_digest_ignores_memory_layout(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    plain = torch.randn(shape).to(dtype)
    strided = torch.empty(*shape, 2, dtype=dtype)[..., 0].copy_(plain)
    expected = parameters_sha256([("w", plain)])
    assert parameters_sha256([("w", plain.to(memory_format=torch.channels_last))]) == expected
    assert parameters_sha256([("w", plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0))]) == expected
    assert parameters_sha256([("w", strided)]) == expected


def test_digest_ignores_the_order_of_tensors_and_gradients() -> None:
    first, second = torch.randn(3, 2, requires_grad=True), torch.randn(5)
    assert parameters_sha256([("a", first), ("b", second)]) == parameters_sha256([("b", second), ("a", first)])


def test_digest_sees_every_bit_name_shape_and_type() -> None:
    zeros = torch.zeros(2, 3)
    flipped = zeros.clone()
    flipped[1, 2] = torch.finfo(torch.float32).smallest_normal
    tensors = [zeros, flipped, -zeros, zeros.reshape(3, 2), zeros.int(), zeros[:, :0], torch.tensor(0.0)]
    digests = {parameters_sha256([("w", tensor)]) for tensor in tensors} | {parameters_sha256([("v", zeros)])}
    assert len(digests) == len(tensors) + 1
