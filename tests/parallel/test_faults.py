"""A rank that fails, stalls or dies ends the job on all ranks, soon, with the cause told once and first."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.needs import needs
from tests.parallel.launch import Run, launch, run_job
from tests.unit.small_runs import write_recipe

WORLDS = [
    pytest.param("horovod", "mpirun", id="horovod-mpi"),
    pytest.param("horovod", "horovodrun-gloo", id="horovod-gloo"),
    pytest.param("mpi", "mpirun", id="mpi"),
    pytest.param("torch", "torchrun", id="torch"),
]
pytestmark = pytest.mark.timeout(100)


def run_faulty(engine: str, launcher: str, fault: str, rank: int = 1, size: int = 2, timeout_s: float = 60) -> Run:
    """The job's end, which must come soon (the start-up on a busy machine included) and leave no process."""
    needs(*{"horovod": ("horovod",), "mpi": ("mpi4py",)}.get(engine, ()))
    options = ["--engine", engine, "--fault", fault, "--rank", str(rank), "--timeout", str(timeout_s)]
    run = launch(launcher, size, [sys.executable, "tests/parallel/faulty.py", *options], timeout_s=80)
    assert not run.timed_out, run.output[-6000:]
    assert run.wall_s < 55 + min(timeout_s, 20), run.output[-6000:]
    assert run.survivors == 0
    return run


def said(run: Run) -> list[str]:
    """Lines of the ranks, without the prefixes that launchers put before them."""
    return [re.sub(r"^\[[\d,]+\]<std(out|err)>: ?", "", line) for line in run.output.splitlines() if line.strip("\0 ")]


@pytest.mark.parametrize(("engine", "launcher"), WORLDS)
def test_an_exception_ends_all_ranks_and_its_traceback_comes_first(engine: str, launcher: str) -> None:
    run = run_faulty(engine, launcher, "raise", size=3 if engine == "mpi" else 2)
    lines = said(run)
    assert run.returncode != 0
    assert re.fullmatch(r"\[rank 1 on host \S+, step 3, phase data\]", lines[0]), run.output[:3000]
    assert lines[1] == "Traceback (most recent call last):"
    assert run.output.count("raise ValueError") == 1
    told = [line for line in lines if line.endswith("ValueError: the loader broke; this rank stops")]
    assert told, run.output
    assert all("rank 1 on host" in line and "failed in step 3, phase data" in line for line in told)


@pytest.mark.parametrize(("engine", "launcher"), WORLDS)
def test_a_rank_that_sleeps_is_named_with_host_step_and_phase(engine: str, launcher: str) -> None:
    run = run_faulty(engine, launcher, "sleep", timeout_s=5)
    assert run.returncode != 0
    found = re.search(
        r"no progress for (\d+) s: rank 1 \(host \S+\) is late: step 3, phase data, where it came \d+ s ago; "
        r"the others wait in step 3, phase exchange; raise comm\.timeout_s if that may take so long",
        run.output,
    )
    assert found, run.output[-6000:]
    assert int(found[1]) <= 8
    assert "in misbehave" in run.output, "the late rank shows where it stands"


@pytest.mark.parametrize(("engine", "launcher"), WORLDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_others(engine: str, launcher: str, rank: int) -> None:
    run = run_faulty(engine, launcher, "kill", rank=rank)
    assert run.returncode != 0
    assert "good end" not in run.output


def test_a_stopped_process_is_known_by_its_silence() -> None:
    run = run_faulty("mpi", "mpirun", "stop", rank=1, size=3, timeout_s=5)
    assert "rank 1 (host" in run.output
    assert "its process gives no sign of life; the others wait in step 3, phase exchange" in run.output


def test_a_stopped_rank_0_is_known_though_it_keeps_the_channel() -> None:
    run = run_faulty("mpi", "mpirun", "stop-seen", rank=0, timeout_s=5)
    pattern = (
        r"no progress for \d+ s: rank 0 \(host \S+\), which keeps the side channel, has not answered for \d+ s, last "
        r"seen in step 3, phase data"
    )
    assert re.search(pattern, run.output), run.output


def test_a_rank_0_that_holds_the_interpreter_is_found_by_the_others() -> None:
    """Its thread that looks for late ranks stands still, and the server of the side channel goes on."""
    run = run_faulty("mpi", "mpirun", "hold-interpreter", rank=0, size=3, timeout_s=5)
    pattern = (
        r"no progress for \d+ s: rank 0 \(host \S+\) is late: step \d+, phase \w+, its process gives no sign of life; "
        r"the others wait in step 3, phase exchange; raise comm\.timeout_s"
    )
    assert re.search(pattern, run.output), run.output[-6000:]


@pytest.mark.parametrize(("engine", "launcher"), [("mpi", "mpirun"), ("torch", "torchrun")])
def test_a_job_that_is_suspended_for_longer_than_its_limit_goes_on(engine: str, launcher: str) -> None:
    run = run_faulty(engine, launcher, "suspend", timeout_s=8)
    assert run.returncode == 0 and run.output.count("came to a good end") == 2, run.output[-6000:]
    assert "no progress" not in run.output


def test_the_startup_limit_is_the_one_named_before_the_first_step() -> None:
    run = run_faulty("torch", "torchrun", "startup-sleep", timeout_s=5)
    assert "all 2 ranks" not in run.output
    assert "rank 1 (host" in run.output
    assert "phase start" in run.output


@pytest.mark.parametrize(
    ("place", "rank", "engine", "late", "others"),
    [
        ("build", 1, "torch", r"step 0, phase start, part \d+", r"step 0, phase start, part \d+"),
        ("eval", 1, "mpi", "step 49, phase eval, part 2", r"step 49, phase eval, part \d+"),
        ("note", 0, "torch", r"step 49, phase eval, part \d+", r"step 49, phase checkpoint, part \d+"),
        ("flush", 1, "mpi", "step 49, phase checkpoint", r"step 49, phase checkpoint, part \d+"),
    ],
)
def test_a_training_that_hangs_names_the_rank_that_has_done_least(
    tmp_path: Path, place: str, rank: int, engine: str, late: str, others: str
) -> None:
    needs(*(("mpi4py",) if engine == "mpi" else ()))
    options = ["--engine", engine, "--rank", str(rank), "--place", place]
    command = [sys.executable, "-m", "tests.parallel.hung", *options, "--run-dir", str(tmp_path / "run")]
    run = launch("mpirun", 2, command, timeout_s=90)
    assert run.returncode != 0 and not run.timed_out and run.survivors == 0, run.output[-6000:]
    sentence = rf"rank {rank} \(host \S+\) is late: {late}, where it came \d+ s ago; the others wait in {others}; raise"
    assert re.search(sentence, run.output), run.output[-6000:]
    assert "in hang" in run.output, "the late rank shows where it stands"


@pytest.mark.parametrize("engine", ["horovod", "mpi", "torch"])
def test_a_training_does_not_wait_for_ever_for_a_rank_that_never_comes(tmp_path: Path, engine: str) -> None:
    needs(*{"horovod": ("horovod",), "mpi": ("mpi4py",)}.get(engine, ()))
    config = write_recipe(tmp_path / "small.yaml", comm={"engine": engine, "timeout_s": 4, "startup_timeout_s": 5})
    ours = [sys.executable, "-m", "hpctrain", "train", str(config), "--run-dir", str(tmp_path / "run")]
    job = ["mpirun", "--oversubscribe", "--allow-run-as-root", "-np", "1", *ours, ":", "-np", "1", "sleep", "1000"]
    run = run_job(job, timeout_s=80)
    assert run.returncode == 1 and not run.timed_out and run.survivors == 0, run.output[-6000:]
    assert re.search(
        rf"hpctrain: rank 0 of 2 on host \S+ has been waiting 5 s for the engine \({engine} on cpu\) to start: check "
        r"that all ranks were started and that their hosts reach each other, or raise comm\.startup_timeout_s",
        run.output,
    ), run.output[-6000:]
    assert not (tmp_path / "run").exists()


def test_a_mistake_found_by_all_ranks_is_one_sentence() -> None:
    run = run_faulty("mpi", "mpirun", "collective-user-error", size=3)
    assert run.returncode == 2
    assert said(run)[0] == "hpctrain: no such file: name another one"
    assert run.output.count("no such file") == 1
    assert "Traceback" not in run.output


def test_a_mistake_found_by_one_rank_ends_all() -> None:
    run = run_faulty("mpi", "mpirun", "user-error", rank=1)
    assert run.returncode == 2
    assert re.fullmatch(
        r"\[rank 1 on host \S+, step 3, phase data\] hpctrain: no such file: name another one", said(run)[0]
    )
    assert "Traceback" not in run.output


def test_a_fault_of_the_machine_is_one_sentence_with_its_place() -> None:
    run = run_faulty("mpi", "mpirun", "machine-error", rank=1)
    assert run.returncode == 1
    assert re.fullmatch(r"\[rank 1 on host \S+, step 3, phase data\] hpctrain: disk full on /scratch", said(run)[0])


def test_the_same_exception_everywhere_is_told_once() -> None:
    run = run_faulty("torch", "mpirun", "same-everywhere", size=3)
    assert run.output.count("Traceback (most recent call last)") == 1, run.output


def test_an_interrupt_ends_all_with_130() -> None:
    run = run_faulty("mpi", "mpirun", "interrupt", rank=0)
    assert run.returncode == 130
    assert "Traceback" not in run.output


def test_ranks_may_leave_in_any_order_after_a_good_end() -> None:
    run = run_faulty("torch", "torchrun", "late-leaver", rank=1)
    assert run.returncode == 0, run.output
    assert run.output.count("came to a good end") == 2
    assert "this rank stops" not in run.output
