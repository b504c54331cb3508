"""What every engine must do, checked on real ranks with closed-form answers; run under a launcher by test_contract.

Each check is a function ``check_*(comm)`` that raises AssertionError. All of them run in one start of the job;
rank r reports the failures by name.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hpctrain.comm import registry
from hpctrain.comm.agree import on_rank_zero, raise_together
from hpctrain.comm.base import Communicator, NoWindow
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import detect
from hpctrain.train.session import choose_device
from tests.parallel import reductions
from tests.parallel.launch import report

SIZES = (0, 1, 7, 1001)
REDUCIBLE = (torch.float16, torch.float32, torch.float64, torch.int32, torch.int64)
MOVABLE = (*REDUCIBLE, torch.bfloat16, torch.uint8, torch.int8, torch.int16, torch.bool)


def ramp(size: int, rank: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, exact in every dtype and in every sum of four ranks, different on each rank."""
    return ((torch.arange(size) + 3 * rank) % 11).to(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == expected.dtype, f"{found.dtype} instead of {expected.dtype}"
    assert torch.equal(found, expected), f"{found.tolist()[:8]} instead of {expected.tolist()[:8]}"


def each_rank(comm: Communicator, size: int, dtype: torch.dtype) -> list[Tensor]:
    return [ramp(size, rank, dtype) for rank in range(comm.world_size)]


def check_topology(comm: Communicator) -> None:
    told = detect(os.environ)
    assert (comm.rank, comm.world_size) == (told.rank, told.world_size)
    assert (comm.topology.local_size, comm.topology.num_nodes) == (comm.world_size, 1)
    # Open MPI deals local ranks out by slot, not always in the order of ranks.
    assert sorted(comm.all_gather_object(comm.topology.local_rank)) == list(range(comm.world_size))
    assert comm.topology.node_rank == 0
    assert comm.versions()


def check_all_reduce(comm: Communicator) -> None:
    for dtype in REDUCIBLE:
        for size in SIZES:
            stacked = torch.stack(each_rank(comm, size, dtype))
            # Twice: a second time the engine answers from its caches.
            for _ in range(2):
                for op, expected in (
                    ("sum", stacked.sum(0, dtype=dtype)),
                    ("min", stacked.amin(0)),
                    ("max", stacked.amax(0)),
                ):
                    buffer = ramp(size, comm.rank, dtype)
                    comm.all_reduce_(buffer, op).wait()
                    same(buffer, expected)


def check_all_reduce_of_a_view(comm: Communicator) -> None:
    store = torch.full((20,), -1.0)
    store[5:12] = ramp(7, comm.rank, torch.float32)
    comm.all_reduce_(store[5:12]).wait()
    same(store[5:12], torch.stack(each_rank(comm, 7, torch.float32)).sum(0))
    assert torch.cat([store[:5], store[12:]]).eq(-1).all()


def check_int64_is_exact(comm: Communicator) -> None:
    buffer = torch.tensor([2**53 + 1 + comm.rank, -(2**60)])
    comm.all_reduce_(buffer).wait()
    world = comm.world_size
    assert buffer.tolist() == [world * (2**53 + 1) + world * (world - 1) // 2, -(2**60) * world]


def check_non_finite_values_spread(comm: Communicator) -> None:
    buffer = torch.ones(3)
    if comm.rank == comm.world_size - 1:
        buffer[0], buffer[1] = float("nan"), float("inf")
    comm.all_reduce_(buffer).wait()
    assert [str(value) for value in buffer.tolist()] == ["nan", "inf", str(float(comm.world_size))]


def check_reduce_scatter(comm: Communicator) -> None:
    for dtype in REDUCIBLE:
        for size in SIZES:
            whole = size * comm.world_size
            expected = torch.stack(each_rank(comm, whole, dtype)).sum(0, dtype=dtype)
            for _ in range(2):
                store = torch.zeros(size + 2, dtype=dtype)
                buffer = ramp(whole, comm.rank, dtype)
                comm.reduce_scatter_(store[1 : size + 1], buffer).wait()
                same(store[1 : size + 1], expected[comm.rank * size : (comm.rank + 1) * size])
                same(buffer, ramp(whole, comm.rank, dtype))
                assert store[0] == store[-1] == 0


def check_all_gather(comm: Communicator) -> None:
    for dtype in MOVABLE:
        for size in SIZES:
            output = torch.zeros(size * comm.world_size, dtype=dtype)
            buffer = ramp(size, comm.rank, dtype)
            comm.all_gather_(output, buffer).wait()
            same(output, torch.cat(each_rank(comm, size, dtype)))
            same(buffer, ramp(size, comm.rank, dtype))


def check_all_to_all(comm: Communicator) -> None:
    for dtype in MOVABLE:
        for size in SIZES:
            output = torch.zeros(size * comm.world_size, dtype=dtype)
            buffer = ramp(size * comm.world_size, comm.rank, dtype)
            comm.all_to_all_(output, buffer).wait()
            mine = slice(comm.rank * size, (comm.rank + 1) * size)
            same(output, torch.cat([sent[mine] for sent in each_rank(comm, size * comm.world_size, dtype)]))
            same(buffer, ramp(size * comm.world_size, comm.rank, dtype))


def check_large_parts(comm: Communicator) -> None:
    """Engines may move large parts in another way."""
    size = 40_001
    mine = slice(comm.rank * size, (comm.rank + 1) * size)
    for _ in range(2):
        gathered = torch.zeros(size * comm.world_size)
        exchanged = torch.zeros(size * comm.world_size)
        sent = ramp(size * comm.world_size, comm.rank, torch.float32)
        works = [comm.all_gather_(gathered, sent[:size]), comm.all_to_all_(exchanged, sent)]
        for work in works:
            work.wait()
        same(gathered, torch.cat(each_rank(comm, size, torch.float32)))
        same(exchanged, torch.cat([whole[mine] for whole in each_rank(comm, size * comm.world_size, torch.float32)]))


def check_gather_to_each_root(comm: Communicator) -> None:
    for root in range(comm.world_size):
        for dtype, size in [*((dtype, 7) for dtype in MOVABLE), *((torch.float32, size) for size in SIZES)]:
            output = torch.zeros(size * comm.world_size, dtype=dtype) if comm.rank == root else None
            buffer = ramp(size, comm.rank, dtype)
            comm.gather_(output, buffer, root).wait()
            same(buffer, ramp(size, comm.rank, dtype))
            if output is not None:
                same(output, torch.cat(each_rank(comm, size, dtype)))


def check_broadcast_from_each_root(comm: Communicator) -> None:
    for root in range(comm.world_size):
        for dtype, size in [*((dtype, 7) for dtype in MOVABLE), *((torch.float32, size) for size in SIZES)]:
            buffer = ramp(size, comm.rank, dtype)
            comm.broadcast_(buffer, root).wait()
            same(buffer, ramp(size, root, dtype))


def check_several_in_flight(comm: Communicator) -> None:
    for _ in range(3):
        reduced = [ramp(100, comm.rank + shift, torch.float32) for shift in range(6)]
        works = [comm.all_reduce_(buffer) for buffer in reduced]
        gathered = torch.zeros(5 * comm.world_size)
        works.append(comm.all_gather_(gathered, ramp(5, comm.rank, torch.float32)))
        # Waiting in another order than starting must do no harm, nor must waiting twice.
        for work in [*reversed(works), works[0]]:
            work.wait()
        for shift, buffer in enumerate(reduced):
            parts = [ramp(100, rank + shift, torch.float32) for rank in range(comm.world_size)]
            same(buffer, torch.stack(parts).sum(0))
        same(gathered, torch.cat(each_rank(comm, 5, torch.float32)))


def check_large_buffer(comm: Communicator) -> None:
    buffer = torch.full((1_000_003,), float(comm.rank + 1))
    comm.all_reduce_(buffer).wait()
    assert buffer.eq(comm.world_size * (comm.world_size + 1) / 2).all()


def check_threads_go_on_while_blocked(comm: Communicator) -> None:
    ticks = []
    over = threading.Event()

    def tick() -> None:
        while not over.wait(0.01):
            ticks.append(1)

    comm.barrier()
    thread = threading.Thread(target=tick)
    thread.start()
    if comm.rank == 0:
        time.sleep(0.5)
    buffer = torch.ones(3)
    comm.all_reduce_(buffer).wait()
    # On a GPU waiting orders streams only, and this blocks.
    buffer.tolist()
    over.set()
    thread.join()
    assert comm.world_size == 1 or len(ticks) > 10, f"{len(ticks)} ticks in half a second"


def check_split(comm: Communicator) -> None:
    groups = [list(range(0, comm.world_size, 2)), list(range(1, comm.world_size, 2)), list(range(comm.world_size))]
    for ranks in [group for group in groups if group] * 2:
        group = comm.split(ranks)
        assert (group is not None) == (comm.rank in ranks)
        if group is None:
            continue
        assert (group.rank, group.world_size) == (ranks.index(comm.rank), len(ranks))
        buffer = torch.tensor([float(comm.rank)])
        group.all_reduce_(buffer).wait()
        assert buffer.item() == sum(ranks)
        for root, world_root in enumerate(ranks):
            buffer = torch.tensor([float(comm.rank)])
            group.broadcast_(buffer, root).wait()
            assert buffer.item() == world_root
            output = torch.zeros(len(ranks))
            group.gather_(output, torch.tensor([float(comm.rank)]), root).wait()
            assert group.rank != root or output.tolist() == ranks
        output = torch.zeros(len(ranks))
        group.all_gather_(output, torch.tensor([float(comm.rank)])).wait()
        assert output.tolist() == ranks
        exchanged = torch.zeros(len(ranks), dtype=torch.int64)
        group.all_to_all_(exchanged, torch.arange(len(ranks)) + 10 * comm.rank).wait()
        assert exchanged.tolist() == [10 * rank + group.rank for rank in ranks]
        part = torch.zeros(1)
        group.reduce_scatter_(part, torch.arange(len(ranks), dtype=torch.float32)).wait()
        assert part.item() == group.rank * len(ranks)
        if comm.name == "horovod" and group.world_size < comm.world_size:
            expect(ValueError, "Horovod splits the world only", lambda group=group: group.split([0]))
        group.barrier()
        group.close()
    comm.barrier()


def check_a_subgroup_is_split_once(comm: Communicator) -> None:
    ranks = list(range(0, comm.world_size, 2))
    group = comm.subgroup(ranks)
    assert comm.subgroup(tuple(ranks)) is group
    assert (group is not None) == (comm.rank in ranks)
    if group is not None:
        buffer = torch.ones(3)
        group.all_reduce_(buffer).wait()
        assert buffer.eq(len(ranks)).all()
    comm.barrier()


def check_objects(comm: Communicator) -> None:
    values = comm.all_gather_object({"rank": comm.rank, "text": "é" * comm.rank, "none": None})
    assert values == [{"rank": rank, "text": "é" * rank, "none": None} for rank in range(comm.world_size)]
    for root in range(comm.world_size):
        assert comm.broadcast_object([root, "x" * 3000] if comm.rank == root else "ignored", root) == [root, "x" * 3000]


def check_barrier(comm: Communicator) -> None:
    comm.barrier()
    started = time.monotonic()
    if comm.rank == comm.world_size - 1:
        time.sleep(0.3)
    comm.barrier()
    assert time.monotonic() - started > 0.25


def check_agreement(comm: Communicator) -> None:
    assert on_rank_zero(comm, lambda: {"from": comm.rank}) == {"from": 0}

    def fail() -> None:
        raise UserError("no such folder")

    expect(UserError, "no such folder", lambda: on_rank_zero(comm, fail))
    raise_together(comm, None)
    last = comm.world_size - 1
    error = MachineError("disk full") if comm.rank == last else None
    expect(MachineError, "disk full" + (f" (rank {last})" if last else ""), lambda: raise_together(comm, error))


def check_wrong_sizes_are_refused(comm: Communicator) -> None:
    whole, part, longer = torch.zeros(2 * comm.world_size + 1), torch.zeros(2), torch.zeros(3)
    expect(ValueError, "do not make", lambda: comm.all_gather_(whole, part))
    expect(ValueError, "do not make", lambda: comm.reduce_scatter_(part, whole))
    expect(ValueError, "1 parts of 3 float32 do not make 2", lambda: comm.all_to_all_(part, longer))
    expect(ValueError, "do not make", lambda: comm.gather_(whole, part, comm.rank))
    expect(ValueError, "the root of a gather needs an output", lambda: comm.gather_(None, part, comm.rank))
    expect(ValueError, "ascending", lambda: comm.split([1, 0]))


def check_dtypes_that_cannot_be_reduced(comm: Communicator) -> None:
    if comm.name != "serial":
        expect(UserError, "cannot reduce bool: use one of ", lambda: comm.all_reduce_(torch.ones(2, dtype=torch.bool)))
    if comm.name == "horovod":
        expect(UserError, "cannot reduce bfloat16", lambda: comm.all_reduce_(torch.ones(2, dtype=torch.bfloat16)))
    else:
        buffer = ramp(9, comm.rank, torch.bfloat16)
        comm.all_reduce_(buffer).wait()
        same(buffer, torch.stack(each_rank(comm, 9, torch.bfloat16)).sum(0, dtype=torch.bfloat16))


def shared_files() -> list[str]:
    """Memory of windows that this process has open or mapped, and files left where others share memory."""
    opened = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            opened.append(os.readlink(f"/proc/self/fd/{number}"))
    mapped = Path("/proc/self/maps").read_text().splitlines()
    left = [name for name in os.listdir("/dev/shm") if "hpctrain" in name]
    return [name for name in [*opened, *mapped] if "memfd:hpctrain" in name] + left


def check_window(comm: Communicator) -> None:
    """Each round each rank fills its part with a value of its own; a torn or early read shows as two values."""
    if comm.device.type != "cpu":
        assert comm.open_window(8) == NoWindow("the buffers lie on a GPU")
        return
    length = 5000
    window = comm.open_window(4 * length)
    assert not isinstance(window, NoWindow), window
    assert len(window.parts) == comm.world_size
    parts = [part.view(torch.float32) for part in window.parts]
    assert all(part.numel() == length for part in parts)
    for turn in range(1000):
        parts[comm.rank].fill_(turn * comm.world_size + comm.rank)
        window.post()
        window.wait(2 * turn + 1)
        for rank, part in enumerate(parts):
            low, high = torch.aminmax(part)
            assert low == high == turn * comm.world_size + rank
        window.post()
        window.wait(2 * turn + 2)
    assert window.posted == 2000
    window.close()
    parts.clear()
    del part, low, high
    assert shared_files() == []


def check_windows_of_a_group_and_of_odd_sizes(comm: Communicator) -> None:
    if comm.device.type != "cpu":
        return
    group = comm.subgroup(range(0, comm.world_size, 2))
    for size in (0, 1, 4096, 4097):
        both = [member.open_window(size) for member in (comm, group) if member is not None]
        for member, window in zip((comm, group), both, strict=False):
            assert member is not None and not isinstance(window, NoWindow)
            window.parts[member.rank].fill_(7 + member.rank)
            window.post()
            window.wait(1)
            assert [part.unique().tolist() for part in window.parts] == [
                [7 + rank] if size else [] for rank in range(member.world_size)
            ]
            window.close()
        comm.barrier()
    del both, window
    assert shared_files() == []


def check_a_window_is_refused_on_all_ranks_alike(comm: Communicator) -> None:
    if comm.device.type != "cpu":
        return
    assert "do not fit in the" in str(comm.open_window(1 << 60))
    last = comm.world_size - 1
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if comm.rank == last:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
    assert comm.open_window(1 << 20) == NoWindow(f"rank {last} gets no memory to share: [Errno 27] File too large")
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    if comm.world_size > 1:
        expect(ValueError, "a window has one size on all ranks", lambda: comm.open_window(8 + comm.rank))
        host = comm.topology.host
        comm.topology = replace(comm.topology, host=f"{host}-{comm.rank % 2}")
        assert comm.open_window(8) == NoWindow("the ranks sit on 2 hosts")
        comm.topology = replace(comm.topology, host=host)
    window = comm.open_window(8)
    assert not isinstance(window, NoWindow), window
    window.close()
    del window
    assert shared_files() == []


def expect(kind: type[Exception], text: str, action: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        action()


CHECKS = reductions.CHECKS | {name: check for name, check in list(globals().items()) if name.startswith("check_")}


def run_checks(comm: Communicator) -> dict[str, str]:
    """Failures by name of the check. After one, ranks may be out of step, so the rest is not run.

    Tensors that a check makes without naming a device lie on the engine's.
    """
    for name, check in CHECKS.items():
        try:
            with comm.device:
                check(comm)
        except Exception:
            return {name: traceback.format_exc()}
    return {}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engine", required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    topology = detect(os.environ)
    comm = registry.create(options.engine, topology, choose_device(options.device, topology), timeout_s=30)
    failures = run_checks(comm)
    report({"failures": failures, "ran": list(CHECKS)})
    if failures:
        comm.abort(1)
    comm.close()


if __name__ == "__main__":
    main()
