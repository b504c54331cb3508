"""hpctrain account: what sacct prints in its forms, joined into a record; nothing where there are no accounts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.launch.accounting import account, parse, summarise
from hpctrain.metrics.record import write_record
from hpctrain.train.launches import Launches
from tests.unit.slurm_doubles import Double
from tests.unit.small_runs import command
from tests.unit.test_record import RECORD

HEADER = "JobID|JobIDRaw|State|ExitCode|ElapsedRaw|MaxRSS|ConsumedEnergyRaw|AllocTRES|NodeList\n"
TRES = "billing=32,cpu=32,gres/gpu=8,mem=180G,node=2"
#: as sacct of Slurm 22.05.8 printed it, of a job that was requeued
REQUEUED = f"""{HEADER}1|1|REQUEUED|0:0|3||0|billing=4,cpu=4,node=2|n[1-2]
1.batch|1.batch|CANCELLED|0:15|3|12348K|0|cpu=2,mem=0,node=1|n1
1.0|1.0|COMPLETED|0:0|3|1700K|0|cpu=4,mem=0,node=2|n[1-2]
1|1|FAILED|1:0|12||0|billing=4,cpu=4,node=2|n[1-2]
1.batch|1.batch|FAILED|1:0|12|12676K|0|cpu=2,mem=0,node=1|n1
1.0|1.0|COMPLETED|0:0|3|1700K|0|cpu=4,mem=0,node=2|n[1-2]
1.1|1.1|COMPLETED|0:0|4|57460K|0|cpu=4,mem=0,node=2|n[1-2]
"""
#: the same of two tasks of an array; the last one has the number of the array itself
TASKS = f"""{HEADER}2_2|5|COMPLETED|0:0|2||0|billing=1,cpu=1,node=1|n2
2_2.batch|5.batch|COMPLETED|0:0|2|10704K|0|cpu=1,mem=0,node=1|n2
2_2.0|5.0|COMPLETED|0:0|2|1780K|0|cpu=1,mem=0,node=1|n2
2_3|2|COMPLETED|0:0|2||0|billing=1,cpu=1,node=1|n1
2_3.batch|2.batch|COMPLETED|0:0|2|10912K|0|cpu=1,mem=0,node=1|n1
2_3.0|2.0|COMPLETED|0:0|2|1684K|0|cpu=1,mem=0,node=1|n1
"""
#: with energy, and memory in several units
WITH_SENSORS = f"""{HEADER}77|77|RUNNING|0:0|3700||5231000|{TRES}|n[1-2]
77.batch|77.batch|RUNNING|0:0|3700||||n1
77.extern|77.extern|RUNNING|0:0|3700|12K|5231000|{TRES}|n[1-2]
77.0|77.0|COMPLETED|0:0|1|1234K|1200|{TRES}|n[1-2]
77.1|77.1|COMPLETED|0:0|3600|1.50G|5230000|{TRES}|n[1-2]
"""
#: without plug-ins for energy or memory; the figure that was never set is one of older versions
WITHOUT_SENSORS = f"""{HEADER}78|78|COMPLETED|0:0|60|||cpu=8,node=1|n1
78.batch|78.batch|COMPLETED|0:0|60|9876K|0|cpu=8,node=1|n1
78.0|78.0|COMPLETED|0:0|50||18446744073709551614|cpu=8,node=1|n1
78.1|78.1|COMPLETED|0:0|5|0|0|cpu=8,node=1|n1
"""
ARRAY = f"""{HEADER}80_[2-9%1]|80|PENDING|0:0|0||||None assigned
80_0|81|TIMEOUT|0:0|600||||n1
80_0.batch|81.batch|CANCELLED|0:15|601|5M|||n1
80_0.0|81.0|CANCELLED by 1000|75:0|599|2.25M|||n1
80_1|82|COMPLETED|0:0|300||||n2
80_1.0|82.0|COMPLETED|0:0|299|2M|||n2
80_1.interactive|82.interactive|COMPLETED|0:0|1|9G|||n2
"""


def test_steps_have_numbers() -> None:
    (start,) = parse(WITH_SENSORS)
    assert (start["job"], start["job_id"], start["state"], start["elapsed_s"]) == ("77", "77", "RUNNING", 3700)
    assert start["alloc_tres"] == {"billing": "32", "cpu": "32", "gres/gpu": "8", "mem": "180G", "node": "2"}
    look, training = start["steps"]
    assert (look["step"], look["max_rss_bytes"]) == (0, 1234 * 1024)
    assert training == {
        "step": 1, "state": "COMPLETED", "exit_status": 0, "exit_signal": 0, "elapsed_s": 3600,
        "energy_j": 5_230_000, "alloc_tres": start["alloc_tres"], "nodes": "n[1-2]", "max_rss_bytes": 3 * 2**29,
    }  # fmt: skip
    totals = summarise([start])
    assert (totals["elapsed_s"], totals["energy_j"], totals["max_rss_bytes"]) == (3700, 5_231_200, 3 * 2**29)


def test_a_requeued_job_has_a_start_for_each_time() -> None:
    first, second = parse(REQUEUED)
    assert (first["state"], first["elapsed_s"], first["exit_status"]) == ("REQUEUED", 3, 0)
    assert (second["state"], second["elapsed_s"], second["exit_status"]) == ("FAILED", 12, 1)
    assert [[step["step"] for step in start["steps"]] for start in (first, second)] == [[0], [0, 1]]
    totals = summarise([first, second])
    assert (totals["elapsed_s"], totals["energy_j"], totals["max_rss_bytes"]) == (15, None, 57460 * 1024)


def test_tasks_are_told_apart_by_their_own_numbers() -> None:
    starts = parse(TASKS)
    assert [(start["job_id"], start["job"], start["nodes"]) for start in starts] == [
        ("2_2", "5", "n2"),
        ("2_3", "2", "n1"),
    ]
    assert [start["steps"][0]["max_rss_bytes"] for start in starts] == [1780 * 1024, 1684 * 1024]


def test_what_was_not_measured_is_null() -> None:
    starts = parse(WITHOUT_SENSORS)
    assert [step["energy_j"] for step in starts[0]["steps"]] == [None, None]
    totals = summarise(starts)
    assert (totals["energy_j"], totals["max_rss_bytes"]) == (None, None)


def test_tasks_of_an_array_are_starts_and_those_that_wait_are_not() -> None:
    first, second = parse(ARRAY)
    assert (first["job_id"], first["job"], first["state"]) == ("80_0", "81", "TIMEOUT")
    (step,) = first["steps"]
    assert (step["state"], step["exit_status"], step["max_rss_bytes"]) == ("CANCELLED", 75, round(2.25 * 2**20))
    assert [step["step"] for step in second["steps"]] == [0]
    assert summarise([first, second])["elapsed_s"] == 900


def test_columns_are_found_by_their_names() -> None:
    rows = [line.split("|") for line in WITH_SENSORS.splitlines()]
    turned = "\n".join("|".join(reversed(row)) for row in rows)
    assert parse(turned) == parse(WITH_SENSORS)


@pytest.mark.parametrize("text", ["", "\n", HEADER])
def test_no_rows_are_no_starts(text: str) -> None:
    assert parse(text) == []


@given(st.text(alphabet="0123456789.KMGTP|\n-x[] ", max_size=80))
def test_no_text_breaks_the_reader(text: str) -> None:
    for header in ("", HEADER):
        summarise(parse(header + text))


def ended_run(folder: Path, *jobs: str) -> Path:
    """A run directory whose launches were those of ``jobs``."""
    run = folder / "run"
    run.mkdir()
    write_record(run / "record.json", RECORD)
    for job in jobs or ("",):
        Launches(run).begin(0, 2, 100, {"SLURM_JOB_ID": job} if job else {})
    return run


def record_of(run: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((run / "record.json").read_text())
    return record


def path_of(folder: Path, **more: str) -> dict[str, str]:
    return {"PATH": f"{folder}:/usr/bin:/bin", **more}


def test_the_record_gains_the_accounts_of_all_jobs_of_the_run(tmp_path: Path) -> None:
    sacct = Double(tmp_path, "sacct", stdout=WITH_SENSORS)
    run = ended_run(tmp_path, "77", "77", "99")
    account(run, path_of(tmp_path))
    (argv,) = sacct.calls
    assert {"--parsable2", "--duplicates", "--jobs=77,99"} < set(argv)
    assert not any("JobName" in word for word in argv), "a bar in a name would shift the columns behind it"
    record = record_of(run)
    assert record.pop("slurm") == summarise(parse(WITH_SENSORS))
    assert record == {"schema": 1, **RECORD}
    account(run, path_of(tmp_path))
    assert record_of(run)["slurm"]["energy_j"] == 5_231_200, "it may be asked for again"


def test_steps_that_are_not_in_the_accounts_yet_are_waited_for(tmp_path: Path) -> None:
    behind = WITH_SENSORS.replace("77.1|COMPLETED", "77.1|RUNNING")
    (tmp_path / "behind").write_text(behind)
    (tmp_path / "up to date").write_text(WITH_SENSORS)
    script = f'#!/bin/bash\ncd "{tmp_path}"\ncat behind\ncp "up to date" behind\n'
    (tmp_path / "sacct").write_text(script)
    (tmp_path / "sacct").chmod(0o755)
    run = ended_run(tmp_path, "77")
    account(run, path_of(tmp_path, SLURM_JOB_ID="77"))
    assert [step["state"] for step in record_of(run)["slurm"]["starts"][0]["steps"]] == ["COMPLETED", "COMPLETED"]


def test_they_are_not_waited_for_for_ever(tmp_path: Path) -> None:
    sacct = Double(tmp_path, "sacct", stdout=WITH_SENSORS.replace("77.1|COMPLETED", "77.1|RUNNING"))
    run = ended_run(tmp_path, "77")
    account(run, path_of(tmp_path, SLURM_JOB_ID="77"), patience_s=0.5)
    assert len(sacct.calls) == 2
    assert record_of(run)["slurm"]["starts"][0]["steps"][1]["state"] == "RUNNING"


@pytest.mark.parametrize("why", ["no sacct", "storage disabled", "no answer", "unknown job", "not under Slurm"])
def test_without_accounts_the_record_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    says = {
        "storage disabled": {"stderr": "Slurm accounting storage is disabled\n", "status": 1},
        "no answer": {"stderr": "sacct: error: Unable to contact slurm database daemon\n", "status": 1},
        "unknown job": {"stdout": HEADER},
        "not under Slurm": {"stdout": WITH_SENSORS},
    }
    if why in says:
        Double(tmp_path, "sacct", **says[why])
    run = ended_run(tmp_path, *([] if why == "not under Slurm" else ["77"]))
    before = (run / "record.json").read_bytes()
    monkeypatch.setenv("PATH", f"{tmp_path}")
    done = command("account", run)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (run / "record.json").read_bytes() == before


def test_a_run_without_a_record_is_named(tmp_path: Path) -> None:
    done = command("account", tmp_path)
    assert done.code == 2
    assert re.search(r"record\.json cannot be read \(No such file or directory\); name the folder of a run", done.err)
