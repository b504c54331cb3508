"""`hpctrain scaling report` on folders of runs: what it prints and writes, and what it refuses."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.unit.scaling_runs import write_run
from tests.unit.small_runs import command


def ideal(folder: Path) -> Path:
    """1, 2 and 4 workers, weak scaling, the last on two nodes."""
    for workers, nodes in ((1, 1), (2, 1), (4, 2)):
        write_run(folder / f"n{workers}", workers, 100.0 * workers, nodes=nodes)
    return folder


def test_it_prints_and_writes_the_same_table(tmp_path: Path) -> None:
    ideal(tmp_path / "runs")
    done = command("scaling", "report", tmp_path / "runs", "--out", tmp_path / "out", "--json", tmp_path / "r.json")
    assert (done.code, done.err) == (0, "")
    text = (tmp_path / "out/scaling.txt").read_text()
    for printed in (done.out, text):
        assert "Weak scaling with 32 samples a worker" in printed
        assert "efficiency E(n) = S(n) b / n" in " ".join(printed.split())
        assert "100.0%" in printed
    assert max(map(len, text.splitlines())) <= 100
    rows = list(csv.DictReader((tmp_path / "out/scaling.csv").open()))
    assert [(row["mode"], row["workers"], row["nodes"], row["efficiency_by_workers"]) for row in rows] == [
        ("weak", "1", "1", "1.0"),
        ("weak", "2", "1", "1.0"),
        ("weak", "4", "2", "1.0"),
    ]
    assert [row["efficiency_by_nodes"] for row in rows] == ["", "1.0", "1.0"]
    (series,) = json.loads((tmp_path / "r.json").read_text())["series"]
    assert [point["images_per_s"]["median"] for point in series["points"]] == [100.0, 200.0, 400.0]
    assert series["baselines"]["nodes"] == {
        "size": {"workers": 2, "nodes": 1},
        "wanted": True,
        "run": str(tmp_path / "runs/n2"),
    }
    assert {row["run"] for row in csv.DictReader((tmp_path / "out/runs.csv").open())} == {
        str(tmp_path / f"runs/n{n}") for n in (1, 2, 4)
    }


def test_every_repeat_is_in_the_files(tmp_path: Path) -> None:
    ideal(tmp_path)
    write_run(tmp_path / "again", 4, 300.0, nodes=2)
    report = tmp_path / "report.json"
    assert command("scaling", "report", tmp_path, "--json", report).code == 0
    point = json.loads(report.read_text())["series"][0]["points"][2]
    assert [run["images_per_s"]["median"] for run in point["runs"]] == [300.0, 400.0]
    assert point["images_per_s"] == pytest.approx({"median": 350.0, "p5": 305.0, "p95": 395.0})


@pytest.mark.parametrize("columns", ["80", "120"])
def test_tables_fit_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    for workers, nodes in ((1, 1), (8, 1), (1024, 128)):
        for repeat, off in enumerate((0.8, 1.0, 1.1)):
            write_run(tmp_path / f"{workers}-{repeat}", workers, off * 2219.3 * workers, nodes=nodes, batch=64)
    out = command("scaling", "report", tmp_path).out
    assert max(map(len, out.splitlines())) <= int(columns)
    (row,) = [line for line in out.splitlines() if line.lstrip().startswith("128 ")]
    assert row.split() == [
        *("128", "1,024", "65,536", "3", "2,272,563"),
        *("-18.0", "+9.0%", "1024.00", "100.0%", "128.00", "100.0%"),
    ]
    assert "…" not in out


def test_runs_are_found_by_name_and_in_folders_each_once(tmp_path: Path) -> None:
    ideal(tmp_path)
    report = tmp_path / "report.json"
    done = command("scaling", "report", tmp_path / "n1", tmp_path, tmp_path / "n1" / "..", "--json", report)
    assert done.code == 0
    assert [len(point["runs"]) for point in json.loads(report.read_text())["series"][0]["points"]] == [1, 1, 1]


def test_a_missing_baseline_is_told(tmp_path: Path) -> None:
    ideal(tmp_path)
    write_run(tmp_path / "n8", 8, 700.0, nodes=4)
    shutil.rmtree(tmp_path / "n1")
    shutil.rmtree(tmp_path / "n2")
    out = " ".join(command("scaling", "report", tmp_path).out.split())
    assert "has one worker: its efficiency is against the smallest, 4 workers" in out
    assert "is on one such node: its efficiency by nodes is against the smallest, 2 nodes" in out
    assert "to 4 ranks" in out and "87.5%" in out


def test_an_efficiency_above_one_is_told(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 1, 100.0)
    write_run(tmp_path / "b", 2, 210.0)
    out = " ".join(command("scaling", "report", tmp_path).out.split())
    assert "2 workers: 105.0% is above 100 %: see that the baseline" in out


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"provenance": {"versions": {"torch": "2.12.0"}}}, "torch differs between runs: 2.13.0+cpu in"),
        ({"provenance": {"git": {"commit": "ab" * 20, "dirty": True}}}, "abababababab with changes in"),
        ({"provenance": {"steal_share": 0.25}}, "gave 25.0% of the machine's time to others"),
        ({"provenance": {"environment": {"NCCL_ALGO": "Tree"}}}, "NCCL_ALGO differs between runs: unset in"),
        ({"provenance": {"environment": {"HOROVOD_RANK": "0"}}}, None),
        ({"throughput": {"steps_measured": 19}}, "n8: its rate is that of 19 steps alone"),
        ({"throughput": {"steps_measured": 1}}, "n8: its rate is that of 1 step alone"),
        ({"throughput": {"steps_measured": 20}, "launch": {"restarts": 0}}, None),
        (
            {"throughput": {"steps_measured": 2}, "launch": {"restarts": 1}},
            "n8 has had 2 launches: its rate is that of the last, from 2 steps",
        ),
    ],
)
def test_what_colours_the_figures_is_told(tmp_path: Path, record: Any, told: str | None) -> None:
    ideal(tmp_path)
    write_run(tmp_path / "n8", 8, 700.0, nodes=4, record=record)
    done = command("scaling", "report", tmp_path)
    assert done.code == 0
    out = " ".join(done.out.split())
    assert told in out if told else "note:" not in out


def test_one_worker_needs_no_engine(tmp_path: Path) -> None:
    ideal(tmp_path)
    shutil.rmtree(tmp_path / "n1")
    write_run(tmp_path / "n1", 1, 100.0, record={"engine": {"name": "serial"}})
    assert command("scaling", "report", tmp_path).code == 0


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"config": {"model": {"name": "resnet18"}}}, r"model.name (resnet18, not resnet20)"),
        ({"config": {"model": {"name": "dense", "neurons": 3}}}, r"model.neurons (3, not unset)"),
        ({"config": {"data": {"image_size": 64}}}, r"data.image_size (64, not 224)"),
        ({"config": {"train": {"precision": "bf16"}}}, r"train.precision (bf16, not fp32)"),
        ({"record": {"engine": {"name": "torch"}}}, r"engine.name (torch, not horovod)"),
        ({"record": {"engine": {"name": "serial"}}}, r"engine.name (serial, not horovod)"),
        ({"record": {"data": {"loader": "synthetic", "real": False}}}, r"data.loader (synthetic, not dali), data.real"),
        ({"record": {"provenance": {"cpu": {"model": "another"}}}}, r"CPU (another, not a CPU)"),
    ],
)
def test_runs_that_differ_in_more_than_size_are_refused(tmp_path: Path, changes: Any, keys: str) -> None:
    ideal(tmp_path)
    write_run(tmp_path / "n8", 8, 700.0, nodes=4, **changes)
    done = command("scaling", "report", tmp_path)
    assert (done.code, done.out) == (2, "")
    assert f"{tmp_path / 'n8'} differs from {tmp_path / 'n1'} in more than size" in done.err
    assert keys in done.err and "leave one out" in done.err and done.err.count("\n") == 1


def test_what_does_not_change_the_work_may_differ(tmp_path: Path) -> None:
    ideal(tmp_path)
    write_run(tmp_path / "n8", 8, 700.0, nodes=4, config={"data": {"path": "elsewhere"}, "log": {"every_steps": 3}})
    assert command("scaling", "report", tmp_path).code == 0


def test_kinds_of_gpu_may_not_differ(tmp_path: Path) -> None:
    for workers, kind in ((1, "H100"), (2, "A100")):
        provenance = {"gpus": {"names": [kind] * 8, "driver": "580"}, "versions": {"torch": "2.13.0"}}
        config = {"train": {"device": "cuda"}}
        write_run(tmp_path / kind, workers, 1.0 * workers, config=config, record={"provenance": provenance})
    assert "GPU (A100, not H100)" in command("scaling", "report", tmp_path).err


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda runs: (runs / "n2/record.json").unlink(), "n2 has no record.json, so the training there has not ended"),
        (lambda runs: (runs / "n2/record.json").write_text("{"), "n2/record.json is not JSON"),
        (lambda runs: [shutil.rmtree(runs / f"n{n}") for n in (2, 4)], "scaling needs at least two sizes"),
        (lambda runs: [(runs / f"n{n}/config.yaml").unlink() for n in (1, 2, 4)], "holds no run (config.yaml)"),
        (lambda runs: shutil.rmtree(runs), "there is no folder"),
        (lambda runs: write_run(runs / "new", 4, float("nan")), "has no rate"),
    ],
)
def test_what_cannot_be_reported_is_one_sentence(tmp_path: Path, fault: Any, message: str) -> None:
    runs = ideal(tmp_path / "runs")
    fault(runs)
    done = command("scaling", "report", runs)
    assert (done.code, done.out) == (2, "")
    assert message in done.err and done.err.count("\n") == 1 and str(runs) in done.err


def test_runs_that_have_not_ended_may_be_left_out_and_are_named(tmp_path: Path) -> None:
    """Of 24 jobs one is bound to fail: before its record, before its configuration, or before its folder was made."""
    runs, failed = ideal(tmp_path / "runs"), tmp_path / "failed"
    shutil.copytree(runs / "n4", failed / "no record")
    (failed / "no record/record.json").unlink()
    (failed / "no run/nccl").mkdir(parents=True)
    names = [failed / "no record", failed / "no run", failed / "no folder"]
    done = command("scaling", "report", runs, *names, "--skip-unfinished", "--json", tmp_path / "r.json")
    assert (done.code, done.err) == (0, "")
    printed = " ".join(done.out.split())
    for name in names:
        sentence = f"note: {name} is left out: it has no record.json, so its training has not ended"
        assert sentence.replace(" ", "") in printed.replace(" ", "")
    assert [point["workers"] for point in json.loads((tmp_path / "r.json").read_text())["series"][0]["points"]] == [
        1,
        2,
        4,
    ]


def test_a_report_of_nothing_but_unfinished_runs_is_none(tmp_path: Path) -> None:
    (ideal(tmp_path / "runs") / "n1/record.json").unlink()
    done = command("scaling", "report", tmp_path / "runs/n1", "--skip-unfinished")
    assert done.code == 2 and "n1 has no record.json, so the training there has not ended: resume it, or" in done.err


def test_an_impossible_folder_is_refused(tmp_path: Path) -> None:
    ideal(tmp_path / "runs")
    (tmp_path / "file").write_text("")
    done = command("scaling", "report", tmp_path / "runs", "--out", tmp_path / "file/out")
    assert done.code == 2 and "cannot make the folder" in done.err and "give another --out" in done.err


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """Not even where torch cannot be imported: on a login node."""
    ideal(tmp_path / "runs")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"sys.argv = ['hpctrain', 'scaling', 'report', {str(tmp_path / 'runs')!r}, '--out', {str(tmp_path / 'o')!r}]\n"
        "from hpctrain.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "o/scaling.csv").is_file()


def test_one_worker_sums_nothing(tmp_path: Path) -> None:
    reductions = {1: "engine", 2: "ordered", 4: "ordered"}
    for workers, reduction in reductions.items():
        write_run(tmp_path / f"n{workers}", workers, 100.0 * workers, record={"wire": {"reduction": reduction}})
    assert "reduction" not in command("scaling", "report", tmp_path).out
    write_run(tmp_path / "n8", 8, 800.0, record={"wire": {"reduction": "engine"}})
    out = " ".join(command("scaling", "report", tmp_path).out.split())
    assert f"reduction differs between runs: ordered in {tmp_path}/n2 and 1 more; engine in {tmp_path}/n8" in out
