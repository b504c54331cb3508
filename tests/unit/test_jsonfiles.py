"""JSON values and whole-or-absent files."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpctrain.errors import MachineError
from hpctrain.metrics.jsonfiles import DurableLog, encode_line, write_atomic, write_json


def test_values_become_valid_json() -> None:
    value = {
        "nan": float("nan"), "inf": [float("inf"), np.float32("-inf")], "numpy": np.float32(0.5), "count": np.int64(3),
        "tensor": torch.tensor(2.5), "path": Path("a/b"), "pair": (1, None), 7: True,
    }  # fmt: skip
    line = encode_line(value)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    assert json.loads(line, parse_constant=refuse) == {
        "nan": None, "inf": [None, None], "numpy": 0.5, "count": 3, "tensor": 2.5, "path": "a/b", "pair": [1, None],
        "7": True,
    }  # fmt: skip


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_failed_write_leaves_the_old_file_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "record.json"
    write_atomic(path, b"old")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"hpctrain.metrics.jsonfiles.{failing}", fail)
    with pytest.raises(
        MachineError, match=r"record\.json: No space left on device; free the disk or make the folder writable$"
    ):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["record.json"]


def test_write_into_a_missing_folder_is_a_machine_error(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"cannot write .*gone/x"):
        write_atomic(tmp_path / "gone" / "x", b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_only_a_run_that_is_under_way_can_be_resumed(tmp_path: Path) -> None:
    log = DurableLog(tmp_path / "log.jsonl")
    log._stream = open("/dev/full", "ab")  # noqa: SIM115
    log.append({"step": 1})
    with pytest.raises(
        MachineError, match=r"log\.jsonl: No space left .*make the folder writable, then resume the run$"
    ):
        log.flush()


def test_a_file_of_json_is_for_people_too(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"rate": float("nan"), "names": ("a",)})
    assert (tmp_path / "x.json").read_text() == '{\n  "rate": null,\n  "names": [\n    "a"\n  ]\n}\n'
