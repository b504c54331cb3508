"""Inputs for the gradient kernels and the comparison with their reference, for whatever device they run on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from hpctrain.kernels import reference
from hpctrain.kernels.base import Kernels, Piece
from hpctrain.kernels.reference import Float32, Float64

WIRES = (torch.float16, torch.bfloat16, torch.float32)
#: Where a wrong rounding or a wrong treatment of the edges of a range would show.
SPECIAL = np.array(
    [
        *(0.0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, -65520, 3.3895e38, 3.4028235e38),
        *(2.0**-14, 2.0**-24, 2.0**-25, np.nextafter(np.float32(2.0**-25), 1), 2.0**-126, 1e-38, 1e-45),
        *(1 + 2.0**-11, 1 + 3 * 2.0**-11, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 300.0, -1e-8),
    ],
    dtype=np.float32,
)
scales = st.integers(-30, 30).map(lambda exponent: 2.0**exponent) | st.just(1.0)


def numbers(size: int, seed: int) -> Float32:
    """Of all magnitudes, a quarter of them special."""
    generator = np.random.default_rng(seed)
    values = (generator.standard_normal(size) * np.exp2(generator.integers(-30, 20, size))).astype(np.float32)
    return np.where(generator.random(size) < 0.25, generator.choice(SPECIAL, size), values).astype(np.float32)


def moderate(size: int, seed: int) -> Float32:
    """Finite ones, whose sums stay finite in every wire."""
    generator = np.random.default_rng(seed)
    return (generator.standard_normal(size) * np.exp2(generator.integers(-12, 3, size))).astype(np.float32)


def on(device: torch.device, values: Float32 | Float64, offset: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """``values`` as a tensor that starts ``offset`` elements into its memory."""
    store = torch.empty(values.size + offset, dtype=dtype, device=device)
    store[offset:].copy_(torch.from_numpy(np.asarray(values)))
    return store[offset:]


def back(tensor: Tensor) -> Float64:
    return np.asarray(tensor.double().cpu().numpy())


def same(found: Tensor, expected: Float64) -> None:
    """The same numbers, the sign of zeros included; any NaN for a NaN."""
    values = back(found)
    alike = (values == expected) & (np.signbit(values) == np.signbit(expected)) | np.isnan(values) & np.isnan(expected)
    assert alike.all(), f"{values[~alike][:4]} instead of {expected[~alike][:4]}"


class Layout:
    """Pieces of the given sizes with gaps between them, at any offsets, over a wire filled with sevens."""

    def __init__(self, device: torch.device, sizes: Sequence[int], dtype: torch.dtype, seed: int, gap: int) -> None:
        self.values = [numbers(size, seed + index) for index, size in enumerate(sizes)]
        self.starts = [int(gap + sum(sizes[:index]) + gap * index) for index in range(len(sizes))]
        self.length = sum(sizes) + gap * (len(sizes) + 2)
        self.pieces = [
            Piece(on(device, values, (seed + index) % 5), start)
            for index, (values, start) in enumerate(zip(self.values, self.starts, strict=True))
        ]
        self.wire = on(device, np.full(self.length, 7.0), seed % 3, dtype)

    def expected(self, parts: Sequence[Float64]) -> Float64:
        """A whole wire with ``parts`` where the pieces go."""
        whole = np.full(self.length, 7.0)
        for start, part in zip(self.starts, parts, strict=True):
            whole[start : start + part.size] = part
        return whole


def check_narrow(kernels: Kernels, layout: Layout, scale: float) -> None:
    """``narrow``, and ``count`` of what it did."""
    dtype = layout.wire.dtype
    kernels.narrow(layout.pieces, layout.wire, scale)
    narrow = [reference.narrow(values, dtype, scale) for values in layout.values]
    same(layout.wire, layout.expected(narrow))
    counts = [reference.count(values, wire, dtype) for values, wire in zip(layout.values, narrow, strict=True)]
    found = kernels.count(layout.pieces, layout.wire, scale)
    assert (found.dtype, found.shape) == (torch.int64, (4,))
    assert found.tolist() == np.sum(counts, axis=0, initial=0, dtype=np.int64).tolist() if counts else [0] * 4


def check_feedback(kernels: Kernels, layout: Layout, scale: float) -> None:
    before = moderate(layout.length, 99)
    residual = on(layout.wire.device, before, 1)
    kernels.narrow_with_feedback(layout.pieces, residual, layout.wire, scale)
    wires, residuals = [], []
    for values, start in zip(layout.values, layout.starts, strict=True):
        kept = before[start : start + values.size]
        wire, left = reference.narrow_with_feedback(values, kept, layout.wire.dtype, scale)
        wires.append(wire)
        residuals.append(left)
    same(layout.wire, layout.expected(wires))
    after = before.astype(np.float64)
    for start, left in zip(layout.starts, residuals, strict=True):
        after[start : start + left.size] = left
    assert np.array_equal(back(residual), after)


def check_widen(
    kernels: Kernels, device: torch.device, parts: Sequence[Float32], wire: torch.dtype, scale: float
) -> None:
    narrowed = [reference.rounded(part.astype(np.float64), wire) for part in parts]
    tensors = [on(device, part, index % 3, wire) for index, part in enumerate(narrowed)]
    size = sum(part.size for part in parts)
    out = on(device, np.full(size, 7.0), 1)
    expected, largest, squares = reference.widen(narrowed, scale)
    for share in (slice(0, size), slice(size // 3, size // 2), slice(0, 0)):
        found = kernels.widen(tensors, out, scale, share, norm=True)
        same(out, expected.astype(np.float64))
        assert (found.dtype, found.shape, found.device.type) == (torch.float64, (2,), device.type)
        assert found[0].item() in (reference.largest(expected[share]), largest)
        if np.isfinite(largest):
            assert abs(found[1].item() - squares) <= 1e-5 * squares


def check_measure(kernels: Kernels, device: torch.device, arrays: Sequence[Float32]) -> None:
    tensors = [on(device, array, index % 3) for index, array in enumerate(arrays)]
    whole = np.concatenate([*arrays, np.zeros(0, np.float32)])
    found = kernels.measure(tensors, norm=True)
    assert (found.dtype, found.shape, found.device.type) == (torch.float64, (2,), device.type)
    assert found[0].item() == kernels.measure(tensors, norm=False)[0].item() == reference.largest(whole)
    squares = float(np.square(whole.astype(np.float64)).sum())
    if np.isfinite(squares):
        assert abs(found[1].item() - squares) <= 1e-5 * squares


def check_sum(kernels: Kernels, device: torch.device, rows: Sequence[Float32], wire: torch.dtype, into: int) -> None:
    """``into`` is the row that the sum overwrites, or -1 for memory of its own."""
    narrowed = [reference.rounded(row.astype(np.float64), wire) for row in rows]
    tensors = [on(device, row, index % 3, wire) for index, row in enumerate(narrowed)]
    out = tensors[into] if into >= 0 else on(device, np.full(rows[0].size, 7.0), 0, wire)
    kernels.sum_rows(tensors, out)
    same(out, reference.sum_rows(narrowed, wire))
    for index, tensor in enumerate(tensors):
        if index != into:
            same(tensor, narrowed[index])
