"""Counter-based random numbers: every random choice about a sample is a hash of (seed, epoch, stream, sample id).

No generator is kept, so nothing has to be saved, restored or skipped ahead: a value depends on its counters
and on nothing that was drawn before. Integer arithmetic alone, hence the same on every machine and with every
numpy. The mixing function is that of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators"). Not for cryptography.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15
_FACTOR_1 = np.uint64(0xBF58476D1CE4E5B9)
_FACTOR_2 = np.uint64(0x94D049BB133111EB)
_MASK = (1 << 64) - 1
_SHIFTS = tuple(np.uint64(bits) for bits in (30, 27, 31, 11))


def _mix_(state: np.ndarray) -> np.ndarray:
    """SplitMix64's output function, in place: a bijection of 64 bits that leaves no trace of order."""
    state ^= state >> _SHIFTS[0]
    state *= _FACTOR_1
    state ^= state >> _SHIFTS[1]
    state *= _FACTOR_2
    state ^= state >> _SHIFTS[2]
    return state


def stream_key(*words: int) -> int:
    """One 64-bit key for a sequence of non-negative integers, such as (seed, epoch, purpose)."""
    key = 0
    for word in words:
        key = int(_mix_(np.array([(key + (word + 1) * _GOLDEN) & _MASK], dtype=np.uint64))[0])
    return key


def hash_counters(key: int, counters: np.ndarray) -> np.ndarray:
    """64 random bits for each of ``counters`` (any shape, non-negative integers) under ``key``; uint64."""
    state = counters.astype(np.uint64)
    state += np.uint64(1)
    state *= np.uint64(_GOLDEN)
    state += np.uint64(key)
    return _mix_(_mix_(state))


def uniforms(key: int, sample_ids: np.ndarray, draws: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 [n, draws]: row i belongs to ``sample_ids[i]`` wherever it stands."""
    counters = sample_ids.astype(np.uint64)[:, None] * np.uint64(draws) + np.arange(draws, dtype=np.uint64)
    return (hash_counters(key, counters) >> _SHIFTS[3]).astype(np.float64) * 2.0**-53


def permutation(key: int, values: np.ndarray) -> np.ndarray:
    """``values`` [n] in random order: sorted by the hash of each, ties (once in 2**64 pairs) in the order given."""
    return values[np.argsort(hash_counters(key, values), kind="stable")]
