from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.split import hold_out, name_hash, safe_stem, sample_key, stem_of_key
from hpctrain.errors import UserError


def hashes_of(sizes: list[int]) -> tuple[list[int], np.ndarray]:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    return [name_hash(f"class{label}", f"picture{number}") for number, label in enumerate(labels)], labels


@given(sizes=st.lists(st.integers(2, 30), min_size=1, max_size=8), fraction=st.floats(0.01, 0.99))
def test_no_class_is_missing_from_either_part(sizes: list[int], fraction: float) -> None:
    hashes, labels = hashes_of(sizes)
    held = hold_out(hashes, labels, fraction)
    everything = set(range(len(sizes)))
    assert set(labels[held].tolist()) == everything
    assert set(labels[~held].tolist()) == everything


@given(sizes=st.lists(st.integers(2, 30), min_size=1, max_size=8), seed=st.integers(0, 100))
def test_the_order_of_the_listing_does_not_matter(sizes: list[int], seed: int) -> None:
    hashes, labels = hashes_of(sizes)
    order = np.random.default_rng(seed).permutation(len(labels))
    shuffled = hold_out(np.array(hashes, dtype=np.uint64)[order], labels[order], 0.3)
    assert (shuffled == hold_out(hashes, labels, 0.3)[order]).all()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_share(fraction: float) -> None:
    hashes, labels = hashes_of([5000])
    assert hold_out(hashes, labels, fraction).mean() == pytest.approx(fraction, abs=0.02)


def test_a_larger_fraction_only_adds_to_what_is_held_out() -> None:
    hashes, labels = hashes_of([50, 50])
    smaller, larger = (hold_out(hashes, labels, fraction) for fraction in (0.2, 0.4))
    assert (larger | ~smaller).all()


def test_classes_of_one_picture_are_in_one_part() -> None:
    hashes, labels = hashes_of([1] * 100)
    held = hold_out(hashes, labels, 0.25)
    assert 10 < held.sum() < 40


@pytest.mark.parametrize("fraction", [0.001, 0.999])
def test_an_empty_part(fraction: float) -> None:
    hashes, labels = hashes_of([1, 1, 1])
    with pytest.raises(UserError, match=f"data.val_fraction={fraction} leaves a part of these 3 pictures empty"):
        hold_out(hashes, labels, fraction)


def test_the_hash_of_a_name_never_changes() -> None:
    # Another value would move pictures between the parts of sets in use.
    assert name_hash("daisy", "100080576_f52e8ee070_n") == 0x8F8F818AC5A6F572


@given(name=st.text(st.characters(blacklist_characters="/\0"), min_size=1).filter(lambda name: name not in (".", "..")))
def test_keys_keep_the_stem(name: str) -> None:
    key = sample_key(7, name + ".jpg")
    assert "." not in key
    assert len(key) < 100
    assert stem_of_key(key + ".jpg") == safe_stem(name + ".jpg")
