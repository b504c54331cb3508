"""What the programs on a GPU are told: which address goes where, as tables that are made here and kept there.

Gradients lie at the same addresses step after step, so a table is uploaded once and found again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Table = NDArray[np.int64]

#: Elements of a chunk: 24 bytes of table for 32 KiB of gradients, and enough chunks to keep every processor busy.
CHUNK = 8192
#: Tables kept: more than a step has buckets, and a few megabytes at most.
_KEPT = 256


def cut_into_chunks(runs: Table, element_bytes: int, chunk: int = CHUNK) -> Table:
    """``runs`` [r, 3] of (address, start, count), those of elements of that size, in rows of up to ``chunk`` elements.

    Empty runs have no row. All chunks of a run but the last are full, so each is aligned as the run is.
    """
    pieces = -(-runs[:, 2] // chunk)
    whole = np.repeat(runs, pieces, axis=0)
    first = np.repeat(np.cumsum(pieces) - pieces, pieces)
    offset = (np.arange(len(whole)) - first) * chunk
    return np.stack(
        [whole[:, 0] + element_bytes * offset, whole[:, 1] + offset, np.minimum(whole[:, 2] - offset, chunk)], axis=1
    )


def consecutive(parts: Sequence[Tensor]) -> Table:
    """Runs that put ``parts`` one behind the other."""
    runs = np.array([(part.data_ptr(), 0, part.numel()) for part in parts], dtype=np.int64).reshape(-1, 3)
    runs[:, 1] = np.cumsum(runs[:, 2]) - runs[:, 2]
    return runs


class Tables:
    """Tables on a device, by what they are made from."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[bytes, int, int], Tensor] = OrderedDict()

    def find(self, source: Table, kind: int, device: torch.device, make: Callable[[Table], Table]) -> Tensor:
        """``make(source)`` on ``device``, valid on its current stream; ``kind`` tells makers apart."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (source.tobytes(), kind, stream)
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            self._kept[key] = _upload(make(source), device)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return self._kept[key]


def _upload(table: Table, device: torch.device) -> Tensor:
    """Without waiting: torch frees the pinned copy only when the device has read it."""
    host = torch.from_numpy(np.ascontiguousarray(table))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
