"""`hpctrain doctor --job` as a job of several ranks: what it tells, what it stops, and that it never waits for ever."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from tests.integration.commands import LIMIT_S, Ranks, hpctrain
from tests.parallel.launch import Run, launch, run_job
from tests.unit.small_runs import command, write_recipe

# Several starts of python and MPI, minutes each where other work has the cores.
pytestmark = pytest.mark.timeout(600)

#: a machine that is busy with other things is not what these tests look for
PATIENT = ("--set", "comm.timeout_s=150")
ODD_JOB = "tests/integration/odd_job.py"


def preflight(ranks: Ranks, config: Path, *words: str | Path, fault: tuple[str, int] | None = None) -> Run:
    through = ("-m", "hpctrain") if fault is None else (ODD_JOB, fault[0], str(fault[1]))
    argv = ["doctor", str(config), "--job", "--set", f"comm.engine={ranks.engine}", *PATIENT, *map(str, words)]
    return hpctrain(ranks, *argv, through=through)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "small.yaml")


@pytest.mark.parametrize("ranks", [Ranks("horovod", "horovodrun", 2), Ranks("torch", "torchrun", 2)], ids=str)
def test_a_sound_job_passes_and_leaves_its_figures(ranks: Ranks, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs/new"
    done = preflight(ranks, config, "--run-dir", run, "--json", tmp_path / "found.json")
    assert (done.returncode, done.survivors) == (0, 0), done.output
    assert f"2 ranks on 1 host, engine {ranks.engine}" in done.output
    assert re.search(r"preflight took [\d.]+ s, [\d.]+ s of it to start", done.output)
    found = json.loads((run / "preflight.json").read_text())
    assert found["complaints"] == [] and [place["rank"] for place in found["places"]] == [0, 1]
    assert all(pace["product_s"] > 0 and pace["sums"][0]["right"] for pace in found["paces"])
    assert [path.name for path in run.iterdir()] == ["preflight.json"]
    assert (tmp_path / "found.json").read_bytes() == (run / "preflight.json").read_bytes()


def test_a_slow_node_is_named_and_stops_the_job_where_asked(config: Path, tmp_path: Path) -> None:
    ranks = Ranks("mpi", "mpirun", 3)
    done = preflight(ranks, config, "--set", "launch.slow_node=stop", fault=("slow", 1))
    assert done.returncode == 1 and not done.timed_out, done.output
    assert re.search(r"n1 is slow \(rank 1 takes [\d.]+ times the median .*again with --exclude=\S*node1", done.output)
    assert done.output.count("submit again with") == 1
    done = preflight(ranks, config, "--run-dir", tmp_path / "run", fault=("slow", 1))
    assert done.returncode == 0, done.output
    assert "warning: " in done.output and "(launch.slow_node is warn)" in done.output
    suspects = json.loads((tmp_path / "run/preflight.json").read_text())["suspects"]
    assert "n1" in [suspect["host"] for suspect in suspects]


def test_a_node_that_computes_wrong_results_stops_the_job_in_any_case(config: Path) -> None:
    done = preflight(Ranks("mpi", "mpirun", 3), config, fault=("wrong", 2))
    assert done.returncode == 1, done.output
    assert "n2 is broken (rank 2 computes another matrix product than the others" in done.output


def test_all_that_is_misplaced_is_told_at_once(config: Path, tmp_path: Path) -> None:
    done = preflight(Ranks("mpi", "mpirun", 2), config, "--run-dir", tmp_path / "run", fault=("misplaced", 1))
    assert done.returncode == 2, done.output
    assert done.output.count("ranks 0, 1 on host n0 share GPU-1: start one rank a GPU") == 1
    assert done.output.count(f"the run directory {tmp_path / 'run'} is not shared") == 1


def test_a_clock_is_compared_between_hosts(config: Path) -> None:
    done = preflight(Ranks("mpi", "mpirun", 2), config, fault=("early", 1))
    assert done.returncode == 1, done.output
    assert re.search(r"the clock of host n1 is (9\d\d|1000)\.\d s or more ahead of that of n0", done.output)


def test_an_engine_that_waits_for_a_rank_ends_within_its_limit(config: Path) -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "15321"}
    argv = [sys.executable, "-m", "hpctrain", "doctor", str(config), "--job"]
    sets = ["--set", "comm.engine=torch", "--set", "comm.timeout_s=5"]
    done = launch("plain", 1, [*argv, *sets], LIMIT_S, env=environ)
    assert done.returncode == 1 and not done.timed_out, done.output
    assert "rank 0 of 2 on host" in done.output
    assert "has been waiting 5 s for the engine (torch on cpu) to start" in done.output


def test_mpi_that_waits_for_a_rank_ends_within_its_limit(config: Path) -> None:
    ours = [sys.executable, "-m", "hpctrain", "doctor", str(config), "--job"]
    sets = ["--set", "comm.engine=mpi", "--set", "comm.timeout_s=5"]
    other = ["sleep", "1000"]
    done = run_job(["mpirun", "-np", "1", *ours, *sets, ":", "-np", "1", *other], LIMIT_S)
    assert done.returncode == 1 and not done.timed_out, done.output
    assert "rank 0 of 2 on host" in done.output
    assert "has been waiting 5 s for the engine (mpi on cpu) to start" in done.output


def test_worlds_of_launcher_and_engine_must_agree(config: Path) -> None:
    done = preflight(Ranks("serial", "mpirun", 2), config)
    assert done.returncode == 2, done.output
    assert "mpirun" in done.output and "comm.engine=auto" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--job"], "doctor --job looks at what training will meet: name its configuration"),
        (["--run-dir", "x"], "are for `hpctrain doctor --job`: add --job"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], message: str) -> None:
    done = command("doctor", *words)
    assert (done.code, done.out) == (2, "") and message in done.err


@pytest.mark.parametrize("words", [["--json"], ["--json", "-"]])
def test_findings_are_printed_as_json_instead(words: list[str], config: Path) -> None:
    done = command("doctor", *words, "--job", config)
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["ok"] is True


def test_a_file_that_cannot_be_written_ends_it_with_a_sentence(config: Path, tmp_path: Path) -> None:
    done = preflight(Ranks("mpi", "mpirun", 2), config, "--json", tmp_path / "none/found.json")
    assert (done.returncode, done.timed_out, done.survivors) == (1, False, 0), done.output
    assert done.output.count(f"cannot write {tmp_path}/none/found.json: No such file or directory") == 1, done.output


def test_a_run_directory_that_cannot_be_made_is_refused(config: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = command("doctor", config, "--job", "--run-dir", tmp_path / "file/run")
    assert done.code == 2 and "cannot write to the run directory" in done.err and "--run-dir" in done.err
