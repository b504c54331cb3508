"""`hpctrain bench gradients` as it is typed: all competitors in processes of their own, verified, timed, told of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from hpctrain.config.load import load_config
from tests.integration.commands import Ranks, hpctrain
from tests.needs import needs
from tests.parallel.launch import ROOT

pytestmark = pytest.mark.timeout(300)

KEYS = {"horovod_mpi_fp16", "horovod_gloo_fp16", "ddp_fp16_hook", "mpi4py_naive", "chainermn_style"}
SMALL = [
    "bench", "gradients", "--model", "dense", "--set", "data.image_size=6", "--set", "data.num_classes=3",
    "--set", "log.every_steps=2",
]  # fmt: skip
PLAIN = Ranks("serial", "plain", 1)
MARK = "HPCTRAIN_TEST_BENCH"


def test_all_peers_are_compared_with_ours(tmp_path: Path) -> None:
    needs("horovod", "mpi4py")
    result, picture = tmp_path / "gradients.json", tmp_path / "gradients.png"
    done = hpctrain(PLAIN, *SMALL, "--rounds", "1", "--json", result, "--picture", picture, "--tune")
    assert (done.returncode, done.survivors) == (0, 0), done.output[-6000:]
    record = json.loads(result.read_text())
    assert set(record["ratios"]) == set(record["ratios_fp32"]) == KEYS
    assert record["ours"] == "hpctrain_horovod"
    assert record["unavailable"] == {}
    for key in ("ratios", "ratios_fp32"):
        for found in record[key].values():
            assert found["rounds"] == [found["median"]]
            assert found["median"] > 0
    for name, apart in record["verified"]["apart"]["fp16"].items():
        # Rounded once or more, and each competitor really was narrow.
        assert 1e-5 < apart < 2e-3, name
        assert record["verified"]["apart"]["fp32"][name] < 1e-6, name
    assert record["variants"]["horovod_mpi"]["fp16"]["samples"]["cpu_s"][0] > 0
    assert record["settings"]["ranks"] == 2
    assert record["provenance"]["versions"]["horovod"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    tuned = load_config(tmp_path / "gradients_tuned.yaml", ["model.name=dense"])
    assert record["tuning"]["best"]["bucket_mib"] == tuned.gradients.bucket_mib
    assert "Horovod over Gloo" in done.output


def test_an_interrupt_while_ranks_start_leaves_none_behind() -> None:
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-m", "hpctrain", *SMALL],
        cwd=ROOT,
        env=os.environ | {MARK: mark, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        # The suite may run in the background, where a shell has processes ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("starting 8 competitors with 2 ranks each")
        time.sleep(2)
        assert len(marked(mark)) > 2
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    assert marked(mark) == []


def marked(mark: str) -> list[psutil.Process]:
    """The processes whose environment has the mark: what they start inherits it."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
