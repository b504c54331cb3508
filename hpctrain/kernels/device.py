"""The gradient kernels for GPUs: one launch of a Triton program for a bucket, however many tensors it reads.

Calls return at once. They work on the current stream of the current device, in order with all else on it; tensors
that live on another stream are the caller's to synchronise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from hpctrain.kernels import fused
from hpctrain.kernels.base import Piece
from hpctrain.kernels.tables import Table, Tables, consecutive, cut_into_chunks

_KINDS = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
#: Contracting a multiplication and an addition would give other bits than the host's kernels.
OPTIONS: dict[str, Any] = {"num_warps": fused.THREADS.value // 32, "enable_fp_fusion": False}


class DeviceKernels:
    """``Kernels`` on a GPU."""

    def __init__(self) -> None:
        self._tables = Tables()

    def narrow(self, pieces: Sequence[Piece], wire: Tensor, scale: float) -> None:
        table = self._chunks(_runs(pieces, wire), 4, wire.device)
        if len(table):
            fused.narrow[(len(table),)](table, wire, scale, **OPTIONS)

    def narrow_with_feedback(self, pieces: Sequence[Piece], residual: Tensor, wire: Tensor, scale: float) -> None:
        table = self._chunks(_runs(pieces, wire), 4, wire.device)
        if len(table):
            fused.narrow_with_feedback[(len(table),)](table, residual, wire, scale, 1 / scale, **OPTIONS)

    def count(self, pieces: Sequence[Piece], wire: Tensor, scale: float) -> Tensor:
        table = self._chunks(_runs(pieces, wire), 4, wire.device)
        counts = torch.empty(len(table), 4, dtype=torch.int32, device=wire.device)
        if len(table):
            fused.count[(len(table),)](table, wire, counts, torch.finfo(wire.dtype).smallest_normal, **OPTIONS)
        return counts.sum(0)

    def widen(
        self, parts: Sequence[Tensor], out: Tensor, scale: float, share: slice | None = None, *, norm: bool = True
    ) -> Tensor:
        """Measures all of ``out`` in any case: on a GPU that hides behind the memory's time."""
        runs = consecutive(parts)
        assert runs[:, 2].sum() == out.numel(), "the parts fill the output"
        table = self._chunks(runs, parts[0].element_size() if parts else 4, out.device)
        chunks = len(table)
        if not chunks:
            return torch.zeros(2, dtype=torch.float64, device=out.device)
        partial = torch.empty(2 * chunks + 2, dtype=torch.float64, device=out.device)
        found = partial[2 * chunks :]
        fused.widen[(chunks,)](table, out, partial, chunks, scale, KIND=_KINDS[parts[0].dtype], **OPTIONS)
        fused.finish_widen[(1,)](partial, chunks, found, **OPTIONS)
        return found

    def measure(self, tensors: Sequence[Tensor], *, norm: bool) -> Tensor:
        figures = torch.zeros(2, dtype=torch.float64, device=tensors[0].device if tensors else None)
        for tensor in tensors:
            if tensor.numel():
                largest = torch.stack(torch.aminmax(tensor)).abs().amax().double()
                figures[0] = torch.maximum(figures[0], torch.where(largest.isfinite(), largest, torch.inf))
                if norm:
                    figures[1] += torch.linalg.vector_norm(tensor, dtype=torch.float64).square()
        return figures

    def sum_rows(self, rows: Sequence[Tensor], out: Tensor) -> None:
        """Up to ``fused.ROWS_AT_ONCE`` rows in one launch; more in levels, with float32 sums between them."""
        while len(rows) > fused.ROWS_AT_ONCE:
            groups = -(-len(rows) // fused.ROWS_AT_ONCE)
            sums = torch.empty(groups, out.numel(), device=out.device)
            self._sum(rows, sums)
            rows = list(sums)
        self._sum(rows, out)

    def _sum(self, rows: Sequence[Tensor], out: Tensor) -> None:
        """``out`` [groups, length] or [length], each row from as many of ``rows``."""
        length, at_once = rows[0].numel(), min(triton.next_power_of_2(len(rows)), fused.ROWS_AT_ONCE)
        if not length:
            return
        pointers = np.array([row.data_ptr() for row in rows], dtype=np.int64)
        vectors = not (pointers % 16).any() and out.data_ptr() % 16 == 0 and (out.dim() == 1 or length % 8 == 0)
        addresses = self._tables.find(pointers, 0, out.device, lambda table: table)
        grid = (triton.cdiv(length, fused.BLOCK.value), -(-len(rows) // at_once))
        kind = _KINDS[rows[0].dtype]
        fused.sum_rows[grid](addresses, out, length, len(rows), AT_ONCE=at_once, KIND=kind, VECTORS=vectors, **OPTIONS)

    def _chunks(self, runs: Table, element_bytes: int, device: torch.device) -> Tensor:
        return self._tables.find(runs, element_bytes, device, lambda table: cut_into_chunks(table, element_bytes))


def _runs(pieces: Sequence[Piece], wire: Tensor) -> Table:
    """The pieces as (address, start, count). A program cannot tell a wrong address, so they are checked here."""
    for piece in pieces:
        values = piece.values
        assert values.dtype == torch.float32 and values.is_contiguous() and values.device == wire.device
        assert 0 <= piece.start <= wire.numel() - values.numel(), "a piece lies inside the wire"
    runs = [(piece.values.data_ptr(), piece.start, piece.values.numel()) for piece in pieces]
    return np.array(runs, dtype=np.int64).reshape(-1, 3)
