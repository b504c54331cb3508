"""The ranks of a competitor as the bench handles them: asleep in between, named when they fail, gone at the end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from hpctrain.bench.gradients import company, launching
from hpctrain.bench.gradients.company import gathered
from hpctrain.bench.gradients.crew import Crew
from hpctrain.bench.gradients.groups import group_named
from hpctrain.bench.gradients.launching import Launched
from hpctrain.bench.gradients.line import Listener, wait_readable
from hpctrain.config.load import load_config
from hpctrain.errors import MachineError, UserError

ROOT = Path(__file__).resolve().parents[2]
GROUP = group_named("ddp")
CONFIG = load_config(None, ["model={name: dense}", "comm.startup_timeout_s=20"])

# A rank that does what it is told: answers late or never, dies, fails, or is fit.
RANK = """
import os, sys, time
from hpctrain.bench.gradients.line import Caller
address, group, rank = sys.argv[1:]
caller = Caller(address)
caller.answer({"group": group, "rank": int(rank)})
while (order := caller.next_order())["do"] != "leave":
    mine = order.get(rank, "fit")
    if mine == "hang":
        time.sleep(100)
    elif mine == "die":
        print("that was too much", flush=True)
        os._exit(3)
    elif mine == "slow":
        for _ in range(4):
            time.sleep(0.6)
            caller.beat()
    elif mine in ("user", "machine", "program"):
        caller.answer({"error": mine, "text": "so it goes"})
        continue
    caller.answer({"rank": rank, "device": "cpu", **({"absent": "not here"} if mine == "absent" else {})})
caller.answer({})
"""


@pytest.fixture(autouse=True)
def _small_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(group: object, ranks: int, address: str, log: Path) -> Launched:
        with log.open("wb") as sink:
            command = [sys.executable, "-c", RANK, address, GROUP.name]
            environ = os.environ | {"PYTHONPATH": str(ROOT)}
            return Launched(
                [
                    subprocess.Popen([*command, str(rank)], env=environ, stdout=sink, stderr=subprocess.STDOUT)
                    for rank in range(ranks)
                ]
            )

    monkeypatch.setattr(launching, "start", start)


@contextmanager
def crew_of_two() -> Iterator[Crew]:
    with gathered([GROUP], 2, CONFIG) as found:
        crew = found.crews[GROUP.name]
        members = list(crew._members)
        yield crew
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)


def assert_asleep(crew: Crew, *, asleep: bool) -> None:
    """Signals take effect when the process that gets them is scheduled."""
    deadline = time.monotonic() + 20
    while any((member.status() == psutil.STATUS_STOPPED) != asleep for member in crew._members):
        assert time.monotonic() < deadline, [member.status() for member in crew._members]
        time.sleep(0.01)


def test_ranks_run_only_when_it_is_their_turn() -> None:
    with crew_of_two() as crew:
        assert_asleep(crew, asleep=True)
        with crew.awake():
            answers = crew.ask({"do": "work"}, 20)
            assert_asleep(crew, asleep=False)
        assert [answer["rank"] for answer in answers] == ["0", "1"]
        assert_asleep(crew, asleep=True)


@pytest.mark.parametrize(
    ("order", "error", "message"),
    [
        ({"1": "hang"}, MachineError, "^ddp shows no progress on rank 1 for 2 s"),
        ({"1": "die"}, MachineError, "^ddp has lost rank 1; the last it said: that was too much$"),
        ({"0": "user", "1": "user"}, UserError, "^so it goes$"),
        ({"0": "machine", "1": "machine"}, MachineError, "^ddp failed on rank 0: so it goes$"),
        ({"0": "program", "1": "die"}, MachineError, "^ddp has lost rank 1"),
    ],
)
def test_what_goes_wrong_is_told_with_group_and_rank(
    order: dict[str, str], error: type[Exception], message: str
) -> None:
    with crew_of_two() as crew, pytest.raises(error, match=message), crew.awake():
        crew.ask({"do": "work", **order}, 2)


def test_the_error_of_one_rank_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.bench.gradients.crew._GRACE_S", 0.3)
    started = time.monotonic()
    message = "^ddp failed on rank 1: so it goes$"
    with crew_of_two() as crew, pytest.raises(MachineError, match=message), crew.awake():
        crew.ask({"do": "work", "0": "hang", "1": "program"}, 60)
    assert time.monotonic() - started < 30


def test_signs_of_life_keep_a_slow_rank() -> None:
    with crew_of_two() as crew, crew.awake():
        assert len(crew.ask({"do": "work", "0": "slow"}, 2)) == 2


def test_an_interrupt_leaves_no_process_behind() -> None:
    interrupt = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT))
    order = {"do": "work", "0": "hang", "1": "hang"}
    with crew_of_two() as crew:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt), crew.awake():
            crew.ask(order, 60)


def test_a_group_that_is_not_here_is_absent_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "RANK", RANK.replace('"fit")', '"absent")'))
    with gathered([GROUP], 2, CONFIG) as found:
        assert found.absent == {"ddp": "not here"}
        assert found.crews == {}
    monkeypatch.setattr(company, "missing_launcher", lambda group: "no mpirun")
    with gathered([GROUP], 2, CONFIG) as found:
        assert found.absent == {"ddp": "no mpirun"}


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("raise SystemExit('no such library')", "ddp ended with status 1 before .*; the last it said: no such library"),
        ("import time; time.sleep(60)", "ddp has not started 2 of its 2 ranks within 1 s"),
    ],
)
def test_ranks_that_never_call_are_told_of(monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    monkeypatch.setitem(globals(), "RANK", script)
    config = CONFIG.model_copy(update={"comm": CONFIG.comm.model_copy(update={"startup_timeout_s": 1.0})})
    with pytest.raises(MachineError, match=message), gathered([GROUP], 2, config):
        pass


def test_a_rank_ends_with_the_bench() -> None:
    listener = Listener(f"hpctrain-test-{os.getpid()}")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RANK, listener.address, "ddp", "0"]
    with subprocess.Popen(command, env=environ, stderr=subprocess.DEVNULL) as rank:
        call = listener.accept(30)
        assert call is not None
        assert call.pid == rank.pid
        assert call.send({"do": "work", "0": "hang"})
        call.close()
        assert rank.wait(30) == 1
    listener.close()


def test_lines_arrive_whole_and_an_end_is_an_end() -> None:
    listener = Listener(f"hpctrain-test-lines-{os.getpid()}")
    assert listener.accept(0.01) is None
    rank = socket.socket(socket.AF_UNIX)
    rank.connect("\0" + listener.address)
    call = listener.accept(5)
    assert call is not None
    rank.sendall(b'{"a": 1}\n{"b"')
    assert call.read_one(time.monotonic() + 5) == {"a": 1}
    rank.sendall(b": 2}\n")
    assert wait_readable([call], 5) == [call]
    assert call.read() == [{"b": 2}]
    assert wait_readable([call], 0.01) == []
    rank.close()
    with pytest.raises(MachineError, match=f"process {os.getpid()} has called the bench and said nothing"):
        call.read_one(time.monotonic() + 5)
    assert call.read() is None
    assert not call.send({"do": "work"})
    listener.close()
