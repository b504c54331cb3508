"""One of several ranks is slow for a while: it is named within two logging intervals, with its phase, once."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from hpctrain.metrics.jsonfiles import read_log
from tests.needs import needs
from tests.parallel.launch import launch
from tests.parallel.slowed import EVERY, FIRST_SLOW, LAST_SLOW, STEPS

FACTOR = 1.5


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("engine", "launcher", "world_size", "phase"),
    [
        ("mpi", "mpirun", 2, "forward"),
        ("torch", "torchrun", 3, "data"),
        ("horovod", "horovodrun-gloo", 4, "backward"),
    ],
)
def test_a_slow_rank_is_named(tmp_path: Path, engine: str, launcher: str, world_size: int, phase: str) -> None:
    needs(*{"horovod": ("horovod",), "mpi": ("mpi4py",)}.get(engine, ()))
    slow = world_size - 1
    options = ["--engine", engine, "--rank", str(slow), "--phase", phase, "--factor", str(FACTOR)]
    command = [sys.executable, "-m", "tests.parallel.slowed", *options, "--run-dir", str(tmp_path)]
    run = launch(launcher, world_size, command, timeout_s=180)
    assert run.returncode == 0, run.output[-6000:]

    record = json.loads((tmp_path / "record.json").read_text())
    spells = [entry for entry in record["stragglers"] if entry["rank"] == slow]
    assert len(spells) == 1, record["stragglers"]
    (spell,) = spells
    assert spell["phase"] == phase and spell["host"] == record["ranks"][slow]["host"]
    assert 1.2 < spell["factor"] < FACTOR + 0.3
    assert FIRST_SLOW <= spell["first_step"] <= spell["last_step"] <= LAST_SLOW + EVERY
    named = [
        line["step"]
        for line in read_log(tmp_path / "steps.jsonl")
        if any(entry["rank"] == slow for entry in line.get("stragglers", ()))
    ]
    assert named[0] < FIRST_SLOW + 2 * EVERY
    assert STEPS not in named
    who = f"rank {slow} on host {spell['host']} holds"
    assert run.output.count(f"{who} the others up") == 1
    assert run.output.count(f"{who} nobody up any more: it was slow from step {spell['first_step']} to") == 1
