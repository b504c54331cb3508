"""What the benchmark of launching makes of the marks that ranks leave, and that it looks for what there is."""

from __future__ import annotations

import ast
import importlib.util
from datetime import datetime
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.launching_timeline import STATIONS, medians, read_marks, split

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def marks_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook by itself: outside a job it does nothing."""
    monkeypatch.delenv("HPCTRAIN_MARKS", raising=False)
    spec = importlib.util.spec_from_file_location("marks", ROOT / "benchmarks/launching_marks/sitecustomize.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rank_file(folder: Path, command: str, rank: int, first_s: float) -> None:
    """A rank that comes to each of its stations a second after the one before."""
    stations = [mark for _, of, mark in STATIONS if of == command]
    lines = [f"{mark} {first_s + number:.6f} {number / 2:.6f}\n" for number, mark in enumerate(stations)]
    lines += [f"import:torch.begin {first_s + 0.25} 0.1\n", f"import:torch.end {first_s + 0.75} 0.3\n"]
    if rank == 0:
        lines += [f"import:numpy.begin {first_s} 0.1\n", f"import:numpy.end {first_s} 0.3\n"]
    (folder / f"{command}-{rank}").write_text("".join(lines))


def test_rows_end_with_the_last_rank_and_add_up_to_the_whole(tmp_path: Path) -> None:
    rank_file(tmp_path, "doctor", 0, 1000.0)
    rank_file(tmp_path, "doctor", 1, 1000.5)
    rank_file(tmp_path, "train", 0, 1010.0)
    rank_file(tmp_path, "train", 1, 1009.0)
    found = split(997.0, 998.0, read_marks(tmp_path))
    rows = found["rows_s"]
    assert rows["slurmctld and slurmd"] == 1.0
    assert rows["the script, its srun, python's start"] == 2.5
    assert rows["its end, the next srun"] == 1010.0 - 1005.5
    assert sum(rows.values()) == found["first_step_s"] == 1019.0 - 997.0
    assert found["preflight_s"] == 1010.0 - 1000.5
    assert found["cpu_s"] == 2 * 5 / 2 + 2 * 9 / 2
    assert found["imports_s"] == {"doctor: torch": 0.5, "train: torch": 0.5}


def test_a_row_is_told_by_its_median_for_each_number_of_nodes() -> None:
    samples = [{"4": {"rows_s": {"imports": 2.0 * n}}, "1": {"rows_s": {"imports": 1.0 * n}}} for n in (1, 5, 2)]
    assert medians(samples, "rows_s") == {"imports": {"1": 2.0, "4": 4.0}}


def test_slurm_says_when_it_gave_a_job_its_nodes() -> None:
    from benchmarks.launching import allocation

    log = (
        "[2026-01-02T03:04:05.250] sched: Allocate JobId=7 NodeList=n[1-4] #CPUs=8 Partition=main\n"
        "[2026-01-02T03:04:06.500] sched: Allocate JobId=77 NodeList=n1 #CPUs=2 Partition=main\n"
        "[2026-01-02T03:04:07.750] sched/backfill: _start_job: Started JobId=7 in main on n[1-4]\n"
    )
    assert allocation(log, "7") == datetime(2026, 1, 2, 3, 4, 7, 750_000).timestamp()
    assert allocation(log, "77") == datetime(2026, 1, 2, 3, 4, 6, 500_000).timestamp()


def test_every_station_is_a_function_that_there_is(marks_module: ModuleType) -> None:
    called = set()
    for module, names in marks_module.CALLS.items():
        tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
        defined = {
            f"{owner}.{node.name}" if owner else node.name
            for owner, body in [("", tree.body), *((c.name, c.body) for c in tree.body if isinstance(c, ast.ClassDef))]
            for node in body
            if isinstance(node, ast.FunctionDef)
        }
        assert set(names) <= defined, module
        called.update(names)
    assert {mark.rpartition(".")[0] for _, _, mark in STATIONS} <= called | {"process"}


def test_a_marked_function_is_marked_once_and_does_what_it_did(marks_module: ModuleType, tmp_path: Path) -> None:
    double = marks_module.Marks(str(tmp_path / "train-0")).around("double", lambda number: 2 * number)
    assert [double(2), double(3)] == [4, 6]
    (rank,) = read_marks(tmp_path)["train"]
    assert list(rank) == ["process.begin", "double.begin", "double.end"]
    assert rank["process.begin"][0] < rank["double.begin"][0] <= rank["double.end"][0]
