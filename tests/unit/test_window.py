from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from hpctrain.comm import window
from hpctrain.comm.base import Communicator, NoWindow, Window
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.errors import MachineError
from hpctrain.topology.ranks import Topology
from tests.unit.fake_group import FakeCommunicator, run_group

NBYTES = 5000
#: a peer: an anonymous file of its own, of which it tells the number, and nothing else
PEER = """
import os, sys
descriptor = os.memfd_create(sys.argv[1])
os.posix_fallocate(descriptor, 0, int(sys.argv[2]))
print(descriptor, flush=True)
sys.stdin.read()
"""


def alone() -> SerialCommunicator:
    return SerialCommunicator(Topology(host="tonga"), torch.device("cpu"))


#: files of other tests' windows, whose exchanges nobody has closed
_before: set[str] = set()


@pytest.fixture(autouse=True)
def _remember_what_is_open() -> None:
    _before.clear()
    _before.update(opened())


def opened() -> list[str]:
    links = []
    for number in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return [link for link in links if "memfd:hpctrain" in link and link not in _before]


@pytest.fixture(params=[True, False], ids=["ordered-stores", "fenced"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_STORES_IN_ORDER", request.param)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_rank_sees_what_all_have_posted(ranks: int) -> None:
    def work(comm: FakeCommunicator) -> None:
        shared = comm.open_window(NBYTES)
        assert not isinstance(shared, NoWindow)
        for turn in range(20):
            shared.parts[comm.rank].fill_(10 * turn + comm.rank)
            shared.post()
            shared.wait(2 * turn + 1)
            seen = [part.unique().tolist() for part in shared.parts]
            assert seen == [[10 * turn + rank] for rank in range(ranks)]
            shared.post()
            shared.wait(2 * turn + 2)
        assert shared.posted == 40
        shared.close()

    run_group(ranks, work, ["tonga"] * ranks)
    assert opened() == []


def test_memory_outlives_the_window_as_long_as_a_tensor_holds_it() -> None:
    shared = alone().open_window(NBYTES)
    assert not isinstance(shared, NoWindow)
    kept = shared.parts[0].view(torch.float16)
    kept.fill_(3)
    shared.close()
    assert bool((kept == 3).all()) and len(opened()) == 1
    del kept
    assert opened() == []


class Peer:
    """Another process with a part of its own, and a window over it and this process's part."""

    def __init__(self) -> None:
        name = f"hpctrain-{os.urandom(16).hex()}"
        size = str(window._counter_at(NBYTES) + 8)
        command = [sys.executable, "-c", PEER, name, size]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        theirs = window._File(int(self.process.stdout.readline()), name)
        mine = window._File.create(NBYTES)
        parts = [
            window._Part(mine, os.getpid(), NBYTES, is_mine=True),
            window._Part(theirs, self.process.pid, NBYTES, is_mine=False),
        ]
        os.close(mine.descriptor)
        self.window: Window = window.SharedWindow(0, "tonga", parts)


@pytest.fixture
def peer() -> Iterator[Peer]:
    started = Peer()
    yield started
    started.process.kill()
    started.process.communicate()


@pytest.mark.parametrize("reaped", [False, True])
def test_a_peer_that_died_is_named(peer: Peer, reaped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_LIFE_CHECK_S", 0.05)
    peer.process.send_signal(signal.SIGKILL)
    if reaped:
        peer.process.wait()
    text = f"rank 1 (host tonga) is gone: its process {peer.process.pid} ended while the others waited for what it "
    with pytest.raises(MachineError, match=re.escape(text)):
        peer.window.wait(1)
    # What it had posted counts, dead or alive.
    peer.window.wait(0)


def test_waiting_leaves_the_core_to_others(peer: Peer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "_LIFE_CHECK_S", 0.4)
    threading.Timer(0.6, peer.process.kill).start()
    cpu, wall = time.thread_time(), time.monotonic()
    with pytest.raises(MachineError):
        peer.window.wait(1)
    cpu, wall = time.thread_time() - cpu, time.monotonic() - wall
    assert wall > 0.5
    assert cpu < 0.4 * wall


def refusal_of(comm: Communicator, nbytes: int = NBYTES) -> str:
    found = comm.open_window(nbytes)
    assert isinstance(found, NoWindow)
    return found.reason


def test_another_file_in_the_place_of_a_part_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    create = window._File.create
    monkeypatch.setattr(window._File, "create", lambda nbytes: create(nbytes)._replace(name="hpctrain-other"))
    comm = alone()
    pattern = r"rank 0 cannot see the memory of rank 0: /proc/\d+/fd/\d+ is another file"
    assert re.fullmatch(pattern, refusal_of(comm))
    assert opened() == []


def test_a_part_whose_process_is_not_to_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window.os, "getpid", lambda: 2**22 + 1)
    comm = alone()
    assert refusal_of(comm).startswith("rank 0 cannot see the memory of rank 0: ")
    assert opened() == []


def test_where_no_memory_can_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_group(3, refusal_of, ["tonga", "fiji", "tonga"]) == ["the ranks sit on 2 hosts"] * 3
    comm = alone()
    pattern = r"1 times 1099511627776 MiB do not fit in the \d+ MiB of memory that are free"
    assert re.fullmatch(pattern, refusal_of(comm, 1 << 60))
    monkeypatch.delattr(os, "memfd_create")
    assert refusal_of(comm) == "Linux has no anonymous files"


def test_buffers_on_a_gpu_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = alone()
    comm.device = torch.device("cuda", 0)
    monkeypatch.setattr(comm, "all_gather_object", lambda value: [value])
    assert refusal_of(comm) == "the buffers lie on a GPU"


def test_ranks_that_disagree_on_the_size_are_stopped() -> None:
    with pytest.raises(ValueError, match=re.escape("a window has one size on all ranks, not [8, 9] bytes")):
        run_group(2, lambda comm: comm.open_window(8 + comm.rank), ["tonga"] * 2)


def test_the_others_parts_are_only_read(peer: Peer) -> None:
    def write(part: Tensor) -> None:
        part[0] = 1

    write(peer.window.parts[0])
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGSEGV, signal.SIG_DFL)
        write(peer.window.parts[1])
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGSEGV
