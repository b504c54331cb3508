"""`hpctrain bench comm` on two ranks under each launcher: verified, timed, fitted; and ended by a wrong result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.integration.commands import Ranks, hpctrain
from tests.parallel.launch import ROOT

pytestmark = pytest.mark.timeout(300)

SMALL = ["bench", "comm", "--min-size", "1KiB", "--max-size", "4KiB", "--rounds", "1"]
PAIRS = [
    Ranks("horovod", "horovodrun", 2),
    Ranks("horovod", "horovodrun-gloo", 2),
    Ranks("mpi", "mpirun", 2),
    Ranks("torch", "torchrun", 2),
]


@pytest.mark.parametrize("ranks", PAIRS, ids=str)
def test_every_operation_of_every_engine(ranks: Ranks, tmp_path: Path) -> None:
    result = tmp_path / "comm.json"
    done = hpctrain(ranks, *SMALL, "--set", f"comm.engine={ranks.engine}", "--json", result)
    assert (done.returncode, done.survivors) == (0, 0), done.output[-6000:]
    record = json.loads(result.read_text())
    assert (record["engine"]["name"], record["world_size"], record["hosts"]) == (ranks.engine, 2, 1)
    assert {case["operation"] for case in record["cases"]} == {
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "all_to_all",
        "broadcast",
    }
    assert {"engine", "ordered"} <= {case["algorithm"] for case in record["cases"]}
    for case in record["cases"]:
        assert [row["size_bytes"] for row in case["sizes"]] == [1024, 4096]
        assert all(row["time_s"]["median"] > 0 for row in case["sizes"])
    assert len(record["fit"]) == len(record["cases"])
    assert done.output.count("every result was exact") == 1


FAULTY = str(ROOT / "tests/integration/faulty_sum.py")


def test_a_wrong_result_ends_the_job_with_1(tmp_path: Path) -> None:
    result = tmp_path / "comm.json"
    argv = [*SMALL, "--dtype", "fp16", "--json", result]
    done = hpctrain(Ranks("horovod", "mpirun", 2), *argv, through=[FAULTY, "wrong"])
    assert (done.returncode, done.survivors) == (1, 0), done.output[-6000:]
    assert "Traceback" not in done.output
    told = "all_reduce of fp16 by wrong is wrong at 1 KiB: rank 1 has 1 wrong elements, at 3 it is 0 instead of 5"
    assert done.output.count(told) == 1, done.output
    assert not result.exists()


def test_a_rank_that_hangs_ends_the_job() -> None:
    limits = ["--set", "comm.timeout_s=4", "--set", "comm.startup_timeout_s=4"]
    done = hpctrain(Ranks("torch", "torchrun", 2), *SMALL, *limits, through=[FAULTY, "hangs"])
    assert (done.returncode, done.survivors, done.timed_out) == (1, 0, False), done.output[-6000:]
    found = re.search(r"no progress for (\d+) s: .*phase exchange", done.output)
    assert found and 4 <= int(found[1]) <= 12, done.output[-6000:]
