"""The gradient kernels on a GPU: against the reference, and in order with torch's and CuPy's work on a stream."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hpctrain.kernels.base import Piece
from hpctrain.kernels.host import HostKernels
from hpctrain.kernels.registry import kernels_for
from tests.needs import needs, needs_gpu
from tests.unit.gradient_cases import (
    WIRES,
    Layout,
    check_feedback,
    check_measure,
    check_narrow,
    check_sum,
    check_widen,
    moderate,
    numbers,
    scales,
)

pytestmark = pytest.mark.gpu
needs_gpu()
needs("triton")

GPU = torch.device("cuda", 0)
KERNELS = kernels_for(GPU)
#: Long enough for any launch to overtake it that does not wait.
SPIN_CYCLES = 50_000_000

some = settings(max_examples=40, deadline=None)
sizes = st.lists(st.sampled_from([0, 1, 1023, 1024, 8191, 8192, 8193]) | st.integers(0, 40_000), max_size=6)
wires = st.sampled_from(WIRES)
seeds = st.integers(0, 2**20)


@some
@given(sizes, wires, seeds, st.sampled_from([0, 3, 8]), scales)
def test_narrow_and_count(sizes: list[int], wire: torch.dtype, seed: int, gap: int, scale: float) -> None:
    check_narrow(KERNELS, Layout(GPU, sizes, wire, seed, gap), scale)


@some
@given(sizes, wires, seeds, st.sampled_from([0, 3, 8]), scales)
def test_narrow_with_feedback(sizes: list[int], wire: torch.dtype, seed: int, gap: int, scale: float) -> None:
    check_feedback(KERNELS, Layout(GPU, sizes, wire, seed, gap), scale)


@some
@given(sizes.filter(bool), wires, seeds, scales)
def test_widen(sizes: list[int], wire: torch.dtype, seed: int, scale: float) -> None:
    for values in (numbers, moderate):
        check_widen(KERNELS, GPU, [values(size, seed + index) for index, size in enumerate(sizes)], wire, scale)


@some
@given(sizes.filter(bool), seeds)
def test_measure(sizes: list[int], seed: int) -> None:
    for values in (numbers, moderate):
        check_measure(KERNELS, GPU, [values(size, seed + index) for index, size in enumerate(sizes)])


@some
@given(st.integers(1, 40), st.integers(0, 20_000), wires, seeds, st.data())
def test_sum_rows(count: int, length: int, wire: torch.dtype, seed: int, data: st.DataObject) -> None:
    into = data.draw(st.integers(-1, count - 1))
    check_sum(KERNELS, GPU, [moderate(length, seed + index) for index in range(count)], wire, into)


@pytest.mark.parametrize("count", [1000, 1024])
def test_sums_of_very_many_rows(count: int) -> None:
    check_sum(KERNELS, GPU, [moderate(500, index) for index in range(count)], torch.float16, -1)


@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16])
def test_a_large_bucket_is_the_same_as_on_the_host(wire: torch.dtype) -> None:
    """25 M numbers, three steps with feedback: wire, residual and result bit for bit."""
    length, host = 25_000_000, HostKernels()
    residuals = [torch.zeros(length, device=device) for device in ("cpu", GPU)]
    sent = [torch.zeros(length, dtype=wire, device=device) for device in ("cpu", GPU)]
    out = [torch.zeros(length, device=device) for device in ("cpu", GPU)]
    for step in range(3):
        values = torch.randn(length, generator=torch.Generator().manual_seed(step)) * 1e-3
        found = []
        for index, kernels in enumerate((host, KERNELS)):
            pieces = [Piece(values.to(sent[index].device), 0)]
            kernels.narrow_with_feedback(pieces, residuals[index], sent[index], 0.5)
            found.append(kernels.widen([sent[index]], out[index], 2.0).tolist())
        for pair in (residuals, sent, out):
            assert torch.equal(pair[0], pair[1].cpu())
        assert found[0][0] == found[1][0]
        assert found[0][1] == pytest.approx(found[1][1], rel=1e-5)


def test_the_same_bits_every_time() -> None:
    wire, out = torch.randn(5_000_000, device=GPU).half(), torch.empty(5_000_000, device=GPU)
    found = [KERNELS.widen([wire], out, 0.5) for _ in range(20)]
    assert all(torch.equal(again, found[0]) for again in found)


def test_calls_return_before_the_device_is_done() -> None:
    values, wire = torch.ones(1000, device=GPU), torch.zeros(1000, device=GPU, dtype=torch.float16)
    KERNELS.narrow([Piece(values, 0)], wire, 1.0)
    torch.cuda.synchronize()
    torch.cuda._sleep(SPIN_CYCLES)
    behind = torch.cuda.Event()
    # A table that is new must be uploaded, and that must not wait either.
    KERNELS.narrow([Piece(values[1:], 3)], wire, 1.0)
    behind.record()
    assert not behind.query()
    torch.cuda.synchronize()


def test_captured_in_a_graph() -> None:
    """The table is uploaded in the warm-up; what is replayed reads the gradients as they are then."""
    values, wire = torch.ones(10_000, device=GPU), torch.zeros(10_000, device=GPU, dtype=torch.float16)
    pieces, stream, graph = [Piece(values, 0)], torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        KERNELS.narrow(pieces, wire, 2.0)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        KERNELS.narrow(pieces, wire, 2.0)
    values.fill_(3.0)
    graph.replay()
    torch.cuda.synchronize()
    assert wire.eq(6.0).all()


@pytest.fixture
def late() -> Iterator[tuple[torch.cuda.Stream, Tensor, Tensor]]:
    """A side stream on which gradients turn from 1 to 3 only after a long while, and a wire of zeros."""
    values, wire = torch.ones(100_000, device=GPU), torch.zeros(100_000, dtype=torch.float16, device=GPU)
    KERNELS.narrow([Piece(values, 0)], wire, 1.0)
    wire.zero_()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES)
        values.fill_(3.0)
    yield stream, values, wire
    torch.cuda.synchronize()


def test_kernels_run_on_the_current_stream(late: tuple[torch.cuda.Stream, Tensor, Tensor]) -> None:
    stream, values, wire = late
    with torch.cuda.stream(stream):
        KERNELS.narrow([Piece(values, 0)], wire, 1.0)
        out = wire.float()
    stream.synchronize()
    assert out.eq(3.0).all()


def test_on_another_stream_they_would_come_too_early(late: tuple[torch.cuda.Stream, Tensor, Tensor]) -> None:
    """The counter-example that gives the tests of order their worth."""
    _, values, wire = late
    other = torch.cuda.Stream()
    with torch.cuda.stream(other):
        KERNELS.narrow([Piece(values, 0)], wire, 1.0)
    other.synchronize()
    assert wire.eq(1.0).all()


@pytest.mark.parametrize("ordered", [True, False])
def test_cupy_shares_memory_and_stream(late: tuple[torch.cuda.Stream, Tensor, Tensor], ordered: bool) -> None:
    """CuPy doubles the wire where it lies, on torch's stream; on one of its own it would find zeros."""
    needs("cupy")
    import cupy

    stream, values, wire = late
    shared = cupy.from_dlpack(wire.detach())
    assert shared.data.ptr == wire.data_ptr()
    # CuPy compiles on first use, which takes longer than the spin, and allocating may wait: both must be behind us.
    doubled = cupy.multiply(cupy.zeros(wire.numel(), np.float16), 2)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES)
        KERNELS.narrow([Piece(values, 0)], wire, 1.0)
    foreign = cupy.cuda.ExternalStream(stream.cuda_stream) if ordered else cupy.cuda.Stream(non_blocking=True)
    with foreign:
        cupy.multiply(shared, 2, out=doubled)
    foreign.synchronize()
    assert bool((doubled == (6.0 if ordered else 0.0)).all())


def test_nccl_sends_what_was_narrowed_before(late: tuple[torch.cuda.Stream, Tensor, Tensor]) -> None:
    """Through the mpi engine's communicator, which has a stream of its own, and back."""
    needs("cupy")
    from hpctrain.comm import serial
    from hpctrain.comm.cupy_nccl import start_nccl
    from hpctrain.topology.ranks import detect

    stream, values, wire = late
    torch.cuda.set_device(GPU)
    comm = start_nccl(serial.boot(detect({}), torch.device("cpu"), 60.0), GPU)
    out, ready = torch.empty_like(wire), torch.empty(wire.numel(), device=GPU)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN_CYCLES)
        KERNELS.narrow([Piece(values, 0)], wire, 1.0)
        comm.all_gather_(out, wire).wait()
        KERNELS.widen([out], ready, 1.0)
    stream.synchronize()
    assert ready.eq(3.0).all()
    comm.close()
