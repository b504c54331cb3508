"""Signals become a flag and nothing else; a run that was asked to end leaves a checkpoint and exit status 75."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch

from hpctrain.launch.exits import PREEMPTED
from hpctrain.launch.preempt import Requests
from hpctrain.launch.timelimit import TimeLimit
from hpctrain.metrics.jsonfiles import read_log
from hpctrain.metrics.launches import read_launches
from hpctrain.train import loop, run
from hpctrain.train.build import Feeds
from hpctrain.train.saver import Saver
from hpctrain.train.state import Progress
from tests.unit.small_runs import command, record_of, saved_steps, write_recipe

NUMBERS = {"USR1": signal.SIGUSR1, "USR2": signal.SIGUSR2, "TERM": signal.SIGTERM}


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """What the test process had, whatever a preempted run in it leaves."""
    before = {number: signal.getsignal(number) for number in NUMBERS.values()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_signal_is_a_flag(name: str) -> None:
    before = signal.getsignal(NUMBERS[name])
    with Requests(["USR1", "USR2", "TERM"]) as requests:
        assert requests.asked() is None
        os.kill(os.getpid(), NUMBERS[name])
        assert requests.asked() == f"SIG{name}"
        os.kill(os.getpid(), signal.SIGUSR2)
        assert requests.asked() == f"SIG{name}", "the first counts"
    assert signal.getsignal(NUMBERS[name]) == before


@pytest.mark.parametrize("listed", [[], ["TERM"], ["USR2"]])
def test_usr1_and_usr2_that_are_not_listed_are_ignored(listed: list[str]) -> None:
    """A job script passes them on whatever is listed; by default each would end the process."""
    before = {number: signal.getsignal(number) for number in NUMBERS.values()}
    with Requests(listed) as requests:
        for name in {"USR1", "USR2"} - set(listed):
            os.kill(os.getpid(), NUMBERS[name])
        assert requests.asked() is None
        if "TERM" not in listed:
            assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    assert {number: signal.getsignal(number) for number in NUMBERS.values()} == before


def test_without_a_list_signals_keep_their_meaning() -> None:
    before = {number: signal.getsignal(number) for number in NUMBERS.values()}
    with Requests() as requests:
        requests.agreed()
        assert {number: signal.getsignal(number) for number in NUMBERS.values()} == before


@pytest.mark.parametrize("listed", [[], ["USR1"], ["USR1", "USR2", "TERM"]])
def test_once_the_ranks_have_agreed_signals_are_ignored(listed: list[str]) -> None:
    """Slurm ends the other tasks when the first has left; that must not change their exit status."""
    interrupt = signal.getsignal(signal.SIGINT)
    with Requests(listed) as requests:
        requests.agreed()
        for number in NUMBERS.values():
            os.kill(os.getpid(), number)
    for number in NUMBERS.values():
        assert signal.getsignal(number) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) == interrupt


def test_the_end_of_the_jobs_time_asks_too() -> None:
    with Requests() as requests:
        requests.limit = TimeLimit(time.time() + 1000, 60, lambda: 0.0, lambda: 0.0)
        assert requests.asked() is None
        end = datetime(2026, 1, 2, 3, 4, 5)
        requests.limit = TimeLimit(end.timestamp(), 60, lambda: 0.0, lambda: 0.0)
        assert requests.asked() == "the job's time limit (2026-01-02 03:04:05)"


def at_step(monkeypatch: pytest.MonkeyPatch, number: int, action: Any) -> None:
    """Call ``action`` within a step, counted from 0."""
    original = loop.train_step

    def step(parts: Any, batches: Any, current: int) -> torch.Tensor:
        if current == number:
            action()
        return original(parts, batches, current)

    monkeypatch.setattr(loop, "train_step", step)


def test_a_run_that_is_asked_to_end_goes_on_later_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_recipe(tmp_path / "small.yaml", train={"max_steps": 20})
    assert command("train", config, "--run-dir", tmp_path / "whole").code == 0
    with monkeypatch.context() as patched:
        at_step(patched, 12, lambda: [os.kill(os.getpid(), number) for number in NUMBERS.values()])
        done = command("train", config, "--run-dir", tmp_path / "run")
    assert done.code == PREEMPTED == 75
    assert "stopped by SIGUSR1, after step 13, its checkpoint is written (exit status 75)\n" in done.out
    assert f"to continue: hpctrain train {config} --run-dir {tmp_path}/run\n" in done.out
    assert saved_steps(tmp_path / "run") == [10, 13]
    assert not (tmp_path / "run/record.json").exists()
    done = command("train", config, "--run-dir", tmp_path / "run")
    assert (done.code, "going on from step 13" in done.out) == (0, True)
    record = record_of(tmp_path / "run")
    assert record["parameters_sha256"] == record_of(tmp_path / "whole")["parameters_sha256"]
    assert (record["launch"]["restarts"], record["launch"]["preemptions"]) == (1, 1)
    assert [launch.step for launch in read_launches(tmp_path / "run")] == [0, 13]
    assert set(record["launch"]["checkpoint"]) == {"every_s", "write_s", "exposed_s"}


def test_a_term_that_is_not_listed_does_not_spoil_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun sends it to the ranks that leave after the first; here it comes while the last checkpoint is written."""
    config = write_recipe(tmp_path / "small.yaml", launch={"signals": ["USR2"]})
    original = Saver.save

    def save(saver: Saver, progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        original(saver, progress)

    def ask() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        monkeypatch.setattr(Saver, "save", save)
        os.kill(os.getpid(), signal.SIGUSR2)

    at_step(monkeypatch, 5, ask)
    done = command("train", config, "--run-dir", tmp_path / "run")
    assert done.code == 75
    assert "stopped by SIGUSR2, after step 6" in done.out
    assert saved_steps(tmp_path / "run") == [6]


def test_a_signal_before_the_first_step_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = run.open_data

    def open_data(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(run, "open_data", open_data)
    done = command("train", write_recipe(tmp_path / "small.yaml"), "--run-dir", tmp_path / "run")
    assert done.code == 75
    assert "stopped by SIGTERM, before the first step (exit status 75)\nto continue: hpctrain train " in done.out
    assert saved_steps(tmp_path / "run") == []


def test_an_evaluation_that_is_cut_short_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one at the end of the run, which nothing else would bring back."""
    config = write_recipe(tmp_path / "small.yaml", train={"epochs": 1})
    with monkeypatch.context() as patched:

        def interrupted(self: Feeds) -> Any:
            os.kill(os.getpid(), signal.SIGUSR1)
            self.on_eval_batch()
            raise AssertionError("the evaluation went on")

        patched.setattr(Feeds, "evaluate", interrupted)
        assert command("train", config, "--run-dir", tmp_path / "run").code == 75
    assert saved_steps(tmp_path / "run")[-1] == 12
    done = command("train", config, "--run-dir", tmp_path / "run")
    assert done.code == 0
    assert record_of(tmp_path / "run")["accuracy"]["seen"] == 4


def test_the_time_limit_ends_a_run_without_a_signal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_s = int(time.time()) + 1000
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end_s))
    at_step(monkeypatch, 5, lambda: monkeypatch.setattr(TimeLimit, "left_s", 0.0))
    done = command("train", write_recipe(tmp_path / "small.yaml"), "--run-dir", tmp_path / "run")
    assert done.code == 75, done.err
    assert "the last checkpoint begins within 9" in done.out
    reason = f"the job's time limit ({datetime.fromtimestamp(end_s):%Y-%m-%d %H:%M:%S})"
    assert f"stopped by {reason}, after step 6, its checkpoint is written (exit status 75)\n" in done.out
    (end,) = (line for line in read_log(tmp_path / "run/launches.jsonl") if line["event"] == "end")
    assert end["reason"] == reason
    assert saved_steps(tmp_path / "run") == [6]


def test_a_limit_that_leaves_no_time_is_told_and_left_to_signals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 55))
    config = write_recipe(tmp_path / "small.yaml", train={"max_steps": 2})
    done = command("train", config, "--run-dir", tmp_path / "run")
    assert done.code == 0
    assert "is closer than launch.margin_s = 60 s allows for a last checkpoint: only a signal will ask" in done.out
