"""The GPU's kernels in Triton's interpreter, on host memory; run in a process of its own by test_kernels_triton.

Each check is a function ``check_*()`` that raises when a result differs from the reference. Prints the failures by
name, as JSON, and the names of all checks.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

# Read when Triton's programs are defined, and for good.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from hpctrain.kernels import fused
from hpctrain.kernels.base import Piece
from hpctrain.kernels.device import DeviceKernels
from hpctrain.kernels.host import HostKernels
from hpctrain.kernels.tables import CHUNK
from tests.unit import gradient_cases as cases

CPU = torch.device("cpu")
KERNELS = DeviceKernels()
BLOCK = fused.BLOCK.value

few = settings(max_examples=7, derandomize=True, deadline=None)
sizes = st.lists(st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1]) | st.integers(0, 2 * BLOCK), max_size=3)
wires = st.sampled_from(cases.WIRES)
seeds = st.integers(0, 2**20)


def mend_bfloat16() -> None:
    """The interpreter cuts float32 off where a GPU rounds it to the nearest bfloat16; let torch do it here.

    That the compiled programs have the GPU's instruction is checked in test_kernels_triton.
    """
    original = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        if (source, target) == (triton.language.float32, triton.language.bfloat16):
            narrowed = torch.from_numpy(np.array(values, ndmin=1)).to(torch.bfloat16)
            return narrowed.view(torch.uint16).numpy().reshape(values.shape)
        if (source, target) == (triton.language.bfloat16, triton.language.float32):
            return values.astype(np.uint32) << 16
        return original(values, source, target, rounding)

    interpreter._convert_float = convert


@few
@given(sizes, wires, seeds, st.sampled_from([0, 3, 8]), cases.scales)
def check_narrow_and_count(sizes: list[int], wire: torch.dtype, seed: int, gap: int, scale: float) -> None:
    cases.check_narrow(KERNELS, cases.Layout(CPU, sizes, wire, seed, gap), scale)


@few
@given(sizes, wires, seeds, st.sampled_from([0, 3, 8]), cases.scales)
def check_narrow_with_feedback(sizes: list[int], wire: torch.dtype, seed: int, gap: int, scale: float) -> None:
    cases.check_feedback(KERNELS, cases.Layout(CPU, sizes, wire, seed, gap), scale)


@few
@given(sizes.filter(bool), wires, seeds, cases.scales)
def check_widen(sizes: list[int], wire: torch.dtype, seed: int, scale: float) -> None:
    for values in (cases.numbers, cases.moderate):
        cases.check_widen(KERNELS, CPU, [values(size, seed + index) for index, size in enumerate(sizes)], wire, scale)


@few
@given(sizes.filter(bool), seeds)
def check_measure(sizes: list[int], seed: int) -> None:
    for values in (cases.numbers, cases.moderate):
        cases.check_measure(KERNELS, CPU, [values(size, seed + index) for index, size in enumerate(sizes)])


@few
@given(st.integers(1, 20), st.integers(0, 2 * BLOCK), wires, seeds, st.data())
def check_sum_rows(count: int, length: int, wire: torch.dtype, seed: int, data: st.DataObject) -> None:
    into = data.draw(st.integers(-1, count - 1))
    cases.check_sum(KERNELS, CPU, [cases.moderate(length, seed + index) for index in range(count)], wire, into)
    cases.check_sum(KERNELS, CPU, [cases.numbers(length, seed + index) for index in range(count)], wire, into)


def check_sums_of_very_many_rows() -> None:
    for count in (63, 1000, 1024):
        cases.check_sum(KERNELS, CPU, [cases.moderate(40, index) for index in range(count)], torch.float16, -1)


def check_both_paths_of_every_alignment() -> None:
    """Sources and destinations at every offset within 16 bytes."""
    values = torch.from_numpy(cases.moderate(1100, 1))
    for source in range(4):
        for start in (0, 1, 4, 7, 8):
            wire = torch.full((1200,), 7.0, dtype=torch.float16)
            piece = cases.on(CPU, values.numpy(), source)
            KERNELS.narrow([Piece(piece, start)], wire, 1.0)
            assert torch.equal(wire[start : start + 1100], values.half())
            assert wire[:start].eq(7).all() and wire[start + 1100 :].eq(7).all()


def check_several_chunks() -> None:
    for extra in (-1, 0, 1):
        length = CHUNK + extra
        layout = cases.Layout(CPU, [length, 2 * CHUNK], torch.bfloat16, 5, 8)
        cases.check_narrow(KERNELS, layout, 8.0)
        cases.check_widen(KERNELS, CPU, [cases.moderate(length, 1), cases.moderate(100, 2)], torch.float16, 0.125)


def check_the_same_as_the_host() -> None:
    """Bit for bit, the residual included, over several steps."""
    wires = [torch.zeros(5000, dtype=torch.float16) for _ in range(2)]
    residuals = [torch.zeros(5000) for _ in range(2)]
    for step in range(3):
        pieces = [Piece(torch.from_numpy(cases.moderate(5000, step)), 0)]
        for kernels, wire, residual in zip((KERNELS, HostKernels()), wires, residuals, strict=True):
            kernels.narrow_with_feedback(pieces, residual, wire, 0.25)
        assert torch.equal(*wires) and torch.equal(*residuals)


def check_squares_beyond_the_range_of_float32() -> None:
    for magnitude in (1e-30, 1e30):
        wire = torch.full((3000,), magnitude)
        largest, squares = KERNELS.widen([wire], torch.empty(3000), 1.0).tolist()
        assert abs(squares - 3000 * largest**2) <= 1e-9 * squares


def check_nothing_to_do() -> None:
    wire = torch.ones(3, dtype=torch.float16)
    KERNELS.narrow([], wire, 2.0)
    KERNELS.narrow_with_feedback([Piece(torch.empty(0), 3)], torch.ones(3), wire, 2.0)
    assert KERNELS.count([], wire, 2.0).tolist() == [0] * 4
    assert KERNELS.widen([wire[:0]], torch.empty(0), 2.0).tolist() == [0, 0]
    KERNELS.sum_rows([wire[:0]] * 5, wire[:0])
    assert wire.tolist() == [1, 1, 1]


def check_pieces_outside_the_wire_are_refused() -> None:
    wire = torch.ones(8, dtype=torch.float16)
    for piece in (Piece(torch.ones(4), 5), Piece(torch.ones(4), -1), Piece(torch.ones(4).half(), 0)):
        try:
            KERNELS.narrow([piece], wire, 1.0)
        except AssertionError:
            continue
        raise RuntimeError(f"{piece} was taken")


CHECKS = {name: value for name, value in globals().items() if name.startswith("check_")}


def main() -> int:
    mend_bfloat16()
    failures = {}
    with np.errstate(all="ignore"):
        for name, check in CHECKS.items():
            try:
                check()
            except Exception:
                failures[name] = traceback.format_exc()
    print(json.dumps({"checks": list(CHECKS), "failures": failures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
