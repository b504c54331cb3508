"""The calls that go to CuPy's NCCL, seen by a stand-in: pointers, counts, types, stream, and order on the device."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from hpctrain.comm import cupy_nccl
from hpctrain.comm.serial import SerialCommunicator
from hpctrain.errors import MachineError, UserError
from hpctrain.topology.ranks import Topology

DEVICE = torch.device("cpu")
NAMES = [
    *["NCCL_UINT8", "NCCL_INT32", "NCCL_INT64", "NCCL_FLOAT16", "NCCL_FLOAT32", "NCCL_FLOAT64"],
    *["NCCL_SUM", "NCCL_MIN", "NCCL_MAX"],
]
STREAM = 4242


class FakeError(RuntimeError):
    pass


class FakeNccl(ModuleType):
    """cupy.cuda.nccl that writes down what it is asked."""

    def __init__(self, log: list[tuple[Any, ...]]) -> None:
        super().__init__("cupy.cuda.nccl")
        for name in NAMES:
            setattr(self, name, name)
        self.NcclError = FakeError
        self.log = log
        self.get_unique_id = lambda: (7, 8, 9)
        self.get_version = lambda: 22809
        self.groupStart = lambda: log.append(("groupStart",))
        self.groupEnd = lambda: log.append(("groupEnd",))

    def NcclCommunicator(self, size: int, unique_id: tuple[int, ...], rank: int) -> Any:
        self.log.append(("start", size, unique_id, rank))
        operations = ("allReduce", "reduceScatter", "allGather", "send", "recv", "bcast", "destroy")
        return SimpleNamespace(**{name: self._recorder(name) for name in operations})

    def _recorder(self, name: str) -> Any:
        return lambda *arguments: self.log.append((name, *arguments))


@pytest.fixture
def log() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def comm(monkeypatch: pytest.MonkeyPatch, log: list[tuple[Any, ...]]) -> cupy_nccl.CupyNcclCommunicator:
    nccl = FakeNccl(log)
    cuda = ModuleType("cupy.cuda")
    cuda.nccl = nccl  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    event = SimpleNamespace(wait=lambda: log.append(("caller waits",)))
    stream = SimpleNamespace(
        cuda_stream=STREAM,
        wait_stream=lambda other: log.append(("waits for", other)),
        record_event=lambda: log.append(("event",)) or event,
        synchronize=lambda: log.append(("synchronize",)),
    )
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "torch's stream")
    started = cupy_nccl.start_nccl(SerialCommunicator(Topology(), torch.device("cpu")), DEVICE)
    assert log.pop() == ("start", 1, (7, 8, 9), 0)
    assert isinstance(started, cupy_nccl.CupyNcclCommunicator)
    return started


def test_an_operation_follows_the_callers_stream_and_is_followed_by_it(
    comm: cupy_nccl.CupyNcclCommunicator, log: list[tuple[Any, ...]]
) -> None:
    buffer = torch.zeros(5)
    work = comm.all_reduce_(buffer)
    pointer = buffer.data_ptr()
    call = ("allReduce", pointer, pointer, 5, "NCCL_FLOAT32", "NCCL_SUM", STREAM)
    assert log == [("waits for", "torch's stream"), call, ("event",)]
    work.wait()
    assert log[3:] == [("caller waits",)]


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float16, "NCCL_FLOAT16"),
        (torch.float64, "NCCL_FLOAT64"),
        (torch.int32, "NCCL_INT32"),
        (torch.int64, "NCCL_INT64"),
    ],
)
@pytest.mark.parametrize(("op", "native"), [("sum", "NCCL_SUM"), ("min", "NCCL_MIN"), ("max", "NCCL_MAX")])
def test_reductions_name_dtype_and_operator(
    comm: cupy_nccl.CupyNcclCommunicator,
    log: list[tuple[Any, ...]],
    dtype: torch.dtype,
    kind: str,
    op: Any,
    native: str,
) -> None:
    comm.all_reduce_(torch.zeros(3, dtype=dtype), op)
    assert log[1][3:] == (3, kind, native, STREAM)


def test_reduce_scatter_counts_what_one_rank_receives(
    comm: cupy_nccl.CupyNcclCommunicator, log: list[tuple[Any, ...]]
) -> None:
    output, buffer = torch.zeros(4), torch.ones(4)
    comm.reduce_scatter_(output, buffer)
    expected = ("reduceScatter", buffer.data_ptr(), output.data_ptr(), 4, "NCCL_FLOAT32", "NCCL_SUM", STREAM)
    assert log[1] == expected


def test_moves_are_counted_in_bytes_of_any_dtype(
    comm: cupy_nccl.CupyNcclCommunicator, log: list[tuple[Any, ...]]
) -> None:
    output, buffer = torch.zeros(6, dtype=torch.bfloat16), torch.ones(6, dtype=torch.bfloat16)
    comm.all_gather_(output, buffer)
    comm.broadcast_(buffer, root=0)
    comm.all_to_all_(output, buffer)
    calls = [entry for entry in log if entry[0] not in ("waits for", "event")]
    sent, received = buffer.data_ptr(), output.data_ptr()
    assert calls == [
        ("allGather", sent, received, 12, "NCCL_UINT8", STREAM),
        ("bcast", sent, 12, "NCCL_UINT8", 0, STREAM),
        ("groupStart",),
        ("send", sent, 12, "NCCL_UINT8", 0, STREAM),
        ("recv", received, 12, "NCCL_UINT8", 0, STREAM),
        ("groupEnd",),
    ]


def test_in_a_gather_all_send_and_the_root_receives(
    comm: cupy_nccl.CupyNcclCommunicator, log: list[tuple[Any, ...]]
) -> None:
    output, buffer = torch.zeros(6), torch.ones(3)
    sent, received = buffer.data_ptr(), output.data_ptr()
    send = ("send", sent, 12, "NCCL_UINT8", 1, STREAM)
    receives = [("recv", received + 12 * peer, 12, "NCCL_UINT8", peer, STREAM) for peer in range(2)]
    for rank, calls in ((0, [send]), (1, [send, *receives])):
        log.clear()
        comm.topology = Topology(rank=rank, world_size=2)
        comm.gather_(output if rank == 1 else None, buffer, root=1)
        assert log[1:-1] == [("groupStart",), *calls, ("groupEnd",)]


def test_empty_buffers_are_not_sent(comm: cupy_nccl.CupyNcclCommunicator, log: list[tuple[Any, ...]]) -> None:
    comm.all_reduce_(torch.zeros(0)).wait()
    assert log == []


def test_a_dtype_that_this_nccl_lacks_is_refused(comm: cupy_nccl.CupyNcclCommunicator) -> None:
    with pytest.raises(UserError, match="the mpi engine cannot reduce bfloat16: use one of float16, float32"):
        comm.all_reduce_(torch.zeros(2, dtype=torch.bfloat16))


def test_what_it_says_it_sums_is_what_this_nccl_sums(
    monkeypatch: pytest.MonkeyPatch, log: list[tuple[Any, ...]]
) -> None:
    """``auto`` picks a reduction by it."""
    nccl, host = FakeNccl(log), SerialCommunicator(Topology(), torch.device("cpu"))
    assert torch.bfloat16 not in cupy_nccl.CupyNcclCommunicator(host, DEVICE, nccl, None, None).reducible
    monkeypatch.setattr(nccl, "NCCL_BFLOAT16", "NCCL_BFLOAT16", raising=False)
    newer = cupy_nccl.CupyNcclCommunicator(host, DEVICE, nccl, None, None)
    assert set(newer.reducible) == {*host.reducible, torch.bfloat16}


def test_small_values_go_over_mpi_and_are_a_sign_of_life(comm: cupy_nccl.CupyNcclCommunicator) -> None:
    arrivals: list[int] = []
    comm.arrive = lambda: arrivals.append(1)
    assert comm.all_gather_object("a") == ["a"] and comm.broadcast_object("b") == "b"
    assert len(arrivals) == 2


def test_a_failed_call_names_the_rank(comm: cupy_nccl.CupyNcclCommunicator, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise FakeError("NCCL_ERROR_UNHANDLED_CUDA_ERROR")

    monkeypatch.setattr(comm._comm, "allReduce", fail)
    text = r"mpi NCCL call failed on rank 0 \(host localhost\): NCCL_ERROR_UNHANDLED_CUDA_ERROR"
    with pytest.raises(MachineError, match=text):
        comm.all_reduce_(torch.zeros(2))


def test_small_values_go_over_mpi_and_closing_ends_both(
    comm: cupy_nccl.CupyNcclCommunicator, log: list[tuple[Any, ...]]
) -> None:
    assert comm.all_gather_object({"a": 1}) == [{"a": 1}]
    assert comm.broadcast_object("x") == "x"
    comm.barrier()
    assert log == []
    comm.close()
    assert log == [("synchronize",), ("destroy",)]


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(UserError, match=r"the mpi engine needs CuPy on a GPU \(.*\): install the extra \[gpu\]"):
        cupy_nccl.start_nccl(SerialCommunicator(Topology(), torch.device("cpu")), DEVICE)
