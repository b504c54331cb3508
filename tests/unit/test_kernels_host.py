"""The kernels of host memory against the reference: every element the same bits."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.gradients.ordered import tree_sum_
from hpctrain.kernels import reference
from hpctrain.kernels.base import Piece
from hpctrain.kernels.host import CHUNK, HostKernels
from hpctrain.kernels.registry import kernels_for
from tests.unit.gradient_cases import (
    SPECIAL,
    WIRES,
    Layout,
    back,
    check_feedback,
    check_measure,
    check_narrow,
    check_sum,
    check_widen,
    moderate,
    numbers,
    on,
    same,
    scales,
)

CPU = torch.device("cpu")
#: Small, so that a few elements make several chunks.
SMALL = 16
KERNELS = HostKernels(SMALL)
EDGE = SMALL * torch.get_num_threads()
#: Pieces may be empty, a chunk, or one element more or less.
sizes = st.lists(st.sampled_from([0, 1, EDGE - 1, EDGE, EDGE + 1]) | st.integers(0, 5 * EDGE), max_size=5)
wires = st.sampled_from(WIRES)
seeds = st.integers(0, 2**20)


@given(sizes, wires, seeds, st.integers(0, 3), scales)
def test_narrow_and_count(sizes: list[int], wire: torch.dtype, seed: int, gap: int, scale: float) -> None:
    check_narrow(KERNELS, Layout(CPU, sizes, wire, seed, gap), scale)


@given(sizes, wires, seeds, st.integers(0, 3), scales)
def test_narrow_with_feedback(sizes: list[int], wire: torch.dtype, seed: int, gap: int, scale: float) -> None:
    check_feedback(KERNELS, Layout(CPU, sizes, wire, seed, gap), scale)


@given(sizes.filter(bool), wires, seeds, scales)
def test_widen(sizes: list[int], wire: torch.dtype, seed: int, scale: float) -> None:
    check_widen(KERNELS, CPU, [numbers(size, seed + index) for index, size in enumerate(sizes)], wire, scale)
    check_widen(KERNELS, CPU, [moderate(size, seed + index) for index, size in enumerate(sizes)], wire, scale)


@given(sizes, seeds)
def test_measure(sizes: list[int], seed: int) -> None:
    for values in (numbers, moderate):
        check_measure(KERNELS, CPU, [values(size, seed + index) for index, size in enumerate(sizes)])


def test_tensors_of_any_strides_are_measured() -> None:
    values = torch.from_numpy(moderate(24_000, 1))
    parts = values[:12_000].view(10, 12, 10, 10).to(memory_format=torch.channels_last), values.view(-1, 2)[6_000:, 1]
    expected = torch.cat([part.reshape(-1) for part in parts]).double()
    largest, squares = KERNELS.measure(parts, norm=True).tolist()
    assert largest == expected.abs().max()
    assert squares == pytest.approx(float(expected.square().sum()), rel=1e-5)


@given(st.integers(1, 40), st.integers(0, 3 * EDGE), wires, seeds, st.data())
def test_sum_rows(count: int, length: int, wire: torch.dtype, seed: int, data: st.DataObject) -> None:
    into = data.draw(st.integers(-1, count - 1))
    check_sum(KERNELS, CPU, [moderate(length, seed + index) for index in range(count)], wire, into)


@settings(max_examples=20)
@given(st.integers(2, 9), wires, seeds)
def test_sums_of_special_values(count: int, wire: torch.dtype, seed: int) -> None:
    check_sum(KERNELS, CPU, [numbers(2 * EDGE, seed + index) for index in range(count)], wire, 0)


@pytest.mark.parametrize("count", [1000, 1024])
def test_sums_of_very_many_rows(count: int) -> None:
    check_sum(KERNELS, CPU, [moderate(20, index) for index in range(count)], torch.float16, -1)


@pytest.mark.parametrize("length", [CHUNK * torch.get_num_threads() + extra for extra in (-1, 0, 1)])
def test_chunks_of_the_size_in_use(length: int) -> None:
    kernels = kernels_for(CPU)
    layout = Layout(CPU, [length], torch.float16, 5, 1)
    check_narrow(kernels, layout, 8.0)
    check_feedback(kernels, layout, 8.0)
    check_widen(kernels, CPU, [moderate(length, 1)], torch.bfloat16, 0.125)
    check_sum(kernels, CPU, [moderate(length, index) for index in range(3)], torch.float16, 1)


@pytest.mark.parametrize("wire", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("run", [1, 7, 64])
def test_rounding_is_to_nearest_even_in_vectors_and_in_their_tails(wire: torch.dtype, run: int) -> None:
    """Every number of the wire, the halfway points, and their float32 neighbours, in runs of ``run``."""
    patterns = torch.arange(0, 1 << 15, 7 if run == 1 else 1, dtype=torch.int16).view(wire)
    grid = patterns[torch.isfinite(patterns)].double().numpy()
    middle = ((grid[1:] + grid[:-1]) / 2).astype(np.float32)
    values = np.concatenate([grid.astype(np.float32), middle, np.nextafter(middle, 0), np.nextafter(middle, np.inf)])
    values = np.concatenate([values, -values, SPECIAL])
    source, sent = on(CPU, values, 1), torch.empty(values.size, dtype=wire)
    pieces = [Piece(part, run * index) for index, part in enumerate(source.split(run))]
    KERNELS.narrow(pieces, sent, 1.0)
    same(sent, reference.rounded(values.astype(np.float64), wire))


@given(seeds, wires, scales)
def test_narrow_is_within_half_a_unit_of_the_exact_product(seed: int, wire: torch.dtype, scale: float) -> None:
    values = moderate(100, seed)
    sent = torch.empty(100, dtype=wire)
    KERNELS.narrow([Piece(torch.from_numpy(values), 0)], sent, scale)
    exact = values.astype(np.float64) * scale
    inside = np.isfinite(back(sent))
    assert (np.abs(back(sent) - exact)[inside] <= reference.FORMATS[wire].unit(exact)[inside] / 2).all()
    assert (np.abs(exact[~inside]) >= 65519).all()


def test_what_feedback_keeps_is_sent_later() -> None:
    """Too small for fp16 ten times over; the sum of what was sent is right all the same."""
    values, residual, wire = torch.full((50,), 3e-8 / 10), torch.zeros(50), torch.empty(50, dtype=torch.float16)
    sent = torch.zeros(50, dtype=torch.float64)
    for _ in range(1000):
        KERNELS.narrow_with_feedback([Piece(values, 0)], residual, wire, 1.0)
        sent += wire.double()
    assert torch.allclose(sent + residual, torch.full_like(sent, 3e-6), rtol=1e-5)
    assert float(residual.abs().max()) <= 3e-8


@pytest.mark.parametrize("magnitude", [1e-30, 1e-20, 1e19, 1e30])
def test_squares_beyond_the_range_of_float32(magnitude: float) -> None:
    wire = torch.full((1000,), magnitude, dtype=torch.bfloat16)
    largest, squares = KERNELS.widen([wire], torch.empty(1000), 1.0).tolist()
    assert largest == wire[0].item()
    assert squares == pytest.approx(1000 * largest**2, rel=1e-5)


def test_the_tree_is_that_of_the_ordered_reduction() -> None:
    for count in range(1, 20):
        rows = torch.from_numpy(np.stack([moderate(30, index) for index in range(count)]))
        out = torch.empty(30)
        KERNELS.sum_rows(list(rows), out)
        assert torch.equal(out, tree_sum_(rows.clone()))


def test_nothing_to_do() -> None:
    wire = torch.ones(3, dtype=torch.float16)
    KERNELS.narrow([], wire, 2.0)
    KERNELS.narrow_with_feedback([], torch.ones(3), wire, 2.0)
    assert KERNELS.count([], wire, 2.0).tolist() == [0] * 4
    assert KERNELS.widen([], torch.empty(0), 2.0).tolist() == [0, 0]
    assert KERNELS.widen([wire[:0]], torch.empty(0), 2.0).tolist() == [0, 0]
    KERNELS.sum_rows([wire[:0]] * 5, wire[:0])
    assert wire.tolist() == [1, 1, 1]


def test_no_call_allocates_more_than_a_chunk() -> None:
    size = 1 << 20
    kernels, wire, out = HostKernels(), torch.empty(size, dtype=torch.float16), torch.empty(size)
    pieces, residual = [Piece(torch.ones(size), 0)], torch.zeros(size)
    with torch.profiler.profile(profile_memory=True) as profile:
        kernels.narrow(pieces, wire, 2.0)
        kernels.narrow_with_feedback(pieces, residual, wire, 2.0)
        kernels.count(pieces, wire, 2.0)
        kernels.widen([wire], out, 0.5)
        kernels.sum_rows([wire] * 5, wire)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * CHUNK * torch.get_num_threads()


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "hpctrain.kernels.device", raising=False)
    with pytest.raises(UserError, match="gradients on cuda:0 need Triton .* install triton in the version that torch"):
        kernels_for(torch.device("cuda", 0))
