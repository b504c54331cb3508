"""The order of an epoch: position -> sample id, a pure function of (seed, epoch).

An order has no state and no length of its own beyond the data set's; how positions are dealt out to workers
and how the end of an epoch is treated is ``hpctrain.data.feed``.

Blocks of neighbouring samples are put in random order, then samples are mixed within windows of so many
blocks. All that is read during a window lies in at most ``window`` contiguous pieces of the shards, on every
rank the same ones, which parallel file systems and page caches serve well; a data set no larger than one
window gets a full permutation. A window must hold samples of many classes: `hpctrain data pack` writes
shards in random order for that reason.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hpctrain.data.hashing import permutation, stream_key

_BLOCKS, _SAMPLES = 1, 2

#: Windows kept in memory: the workers of one global batch stand in the same window or in two adjoining ones.
_CACHED_WINDOWS = 3


class EpochOrder:
    """Orders of a data set of ``num_samples``, by ``block`` samples and ``window`` blocks.

    Takes memory for three windows (8 bytes a sample), not for the data set.
    """

    def __init__(self, num_samples: int, seed: int, block: int, window: int) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self._block = block
        self._window = window
        self._num_blocks = -(-num_samples // block)
        self._block_order = lru_cache(maxsize=2)(self._make_block_order)
        self._window_ids = lru_cache(maxsize=_CACHED_WINDOWS)(self._make_window_ids)

    def ids(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Sample ids [stop - start] int64 at positions ``start`` … ``stop`` - 1 of ``epoch``."""
        if not 0 <= start <= stop <= self.num_samples:
            raise IndexError(f"positions {start} … {stop} of an epoch of {self.num_samples} samples")
        _, starts = self._block_order(epoch)
        pieces = []
        window = int(np.searchsorted(starts, start, side="right")) - 1
        while start < stop:
            ids = self._window_ids(epoch, window)
            offset = start - int(starts[window])
            piece = ids[offset : offset + stop - start]
            pieces.append(piece)
            start += len(piece)
            window += 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    def _make_block_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the order of ``epoch``, and the position at which each window starts."""
        blocks = permutation(stream_key(self._seed, epoch, _BLOCKS), np.arange(self._num_blocks, dtype=np.int64))
        sizes = np.minimum((blocks + 1) * self._block, self.num_samples) - blocks * self._block
        firsts = np.arange(0, self._num_blocks, self._window)
        starts = np.concatenate(([0], np.cumsum(sizes)))[firsts]
        return blocks, starts

    def _make_window_ids(self, epoch: int, window: int) -> np.ndarray:
        """The samples of one window in the order of ``epoch``."""
        blocks, _ = self._block_order(epoch)
        members = np.sort(blocks[window * self._window : (window + 1) * self._window])
        ids = (members[:, None] * self._block + np.arange(self._block)).reshape(-1)
        return permutation(stream_key(self._seed, epoch, _SAMPLES), ids[ids < self.num_samples])
