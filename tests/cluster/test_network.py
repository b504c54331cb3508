"""The benchmark between hosts: its record says what was on the wire, and its bound is that of the cable."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.timeout(300)


def test_half_the_bytes_in_fp16(tmp_path: Path) -> None:
    path = tmp_path / "network.json"
    options = ["--hosts", "2", "--rate", "200mbit", "--model", "resnet20", "--groups", "hpctrain_torch", "ddp"]
    options += ["--reduction", "engine", "--rounds", "1", "--steps", "2", "--json", str(path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.network", *options], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert path.exists(), done.stderr
    record = json.loads(path.read_text())
    # Two exchanges beside other tests' jobs tell nothing of the time; what the record says of it is what the run says.
    assert done.returncode == (0 if record["passed"] else 1), done.stderr
    assert record["sentence"] in done.stdout
    rows = {(row["competitor"], row["compression"]): row for row in record["rows"]}
    assert set(rows) == {(name, wire) for name in ("hpctrain_torch", "ddp") for wire in ("none", "fp16")}
    # Relative to the ring's bytes in the format that was asked for.
    assert all(0.95 < row["sent_over_ring"] < 1.1 for row in rows.values())
    assert rows["ddp", "none"]["bound_s"] == 2 * rows["ddp", "fp16"]["bound_s"]
    assert max(record["payload_bytes_per_s"]) < 200e6 / 8
    assert set(record["ratios"]["fp16"]) == {"ddp / hpctrain_torch"}
