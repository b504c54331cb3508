"""The order of an epoch is a permutation, whatever the sizes, and an honest shuffle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data.sampler import EpochOrder

sizes = st.integers(1, 400)
small = st.integers(1, 40)


@settings(deadline=None)
@given(sizes, small, small, st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_every_epoch_is_a_permutation(num_samples: int, block: int, window: int, seed: int, epoch: int) -> None:
    ids = EpochOrder(num_samples, seed, block, window).ids(epoch, 0, num_samples)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(num_samples))


@settings(deadline=None)
@given(sizes, small, small, st.data())
def test_any_slice_is_that_slice_of_the_epoch(num_samples: int, block: int, window: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, num_samples))
    stop = data.draw(st.integers(start, num_samples))
    whole = EpochOrder(num_samples, 5, block, window).ids(2, 0, num_samples)
    part = EpochOrder(num_samples, 5, block, window).ids(2, start, stop)
    assert np.array_equal(part, whole[start:stop])


def test_order_depends_on_epoch_and_seed_alone() -> None:
    order = EpochOrder(1000, 1, 16, 8)
    first = order.ids(0, 0, 1000)
    assert not np.array_equal(first, order.ids(1, 0, 1000))
    assert not np.array_equal(first, EpochOrder(1000, 2, 16, 8).ids(0, 0, 1000))
    assert np.array_equal(first, EpochOrder(1000, 1, 16, 8).ids(0, 0, 1000))


def test_order_of_seed_1_does_not_change_between_versions() -> None:
    """A resumed run relies on it: change this and checkpoints of earlier versions see samples twice."""
    assert EpochOrder(12, 1, 4, 2).ids(0, 0, 12).tolist() == FIXED_ORDER


FIXED_ORDER = [0, 1, 4, 3, 7, 6, 5, 2, 10, 9, 8, 11]


def test_a_window_reads_whole_blocks_only() -> None:
    order = EpochOrder(10_000, 3, block=100, window=5)
    for window in range(20):
        ids = order.ids(0, window * 500, (window + 1) * 500)
        assert len(np.unique(ids // 100)) == 5


def test_a_set_within_one_window_is_shuffled_as_a_whole() -> None:
    ids = EpochOrder(1000, 1, block=100, window=10).ids(0, 0, 1000)
    # Neighbours in a full permutation are 333 apart on average.
    assert 280 < np.abs(np.diff(ids)).mean() < 390


def test_batches_of_class_sorted_data_are_mixed() -> None:
    labels = np.repeat(np.arange(100), 500)
    order = EpochOrder(len(labels), 1, block=64, window=64)
    for start in range(0, 40_000, 8_000):
        counts = np.bincount(labels[order.ids(0, start, start + 256)], minlength=100) / 256
        entropy = -(counts[counts > 0] * np.log2(counts[counts > 0])).sum()
        # An independent draw of 256 from 100 classes has 6.35 bits; a buffer of 1,024 sorted samples at most 2.
        assert entropy > 5.0


def test_positions_outside_the_epoch_are_refused() -> None:
    with pytest.raises(IndexError, match="of an epoch of 10 samples"):
        EpochOrder(10, 1, 4, 2).ids(0, 5, 11)
