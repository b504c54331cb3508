"""How figures that were taken several times are told: their middle and how far they spread, by order, not by means.

One hiccup among many samples moves none of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Standard deviations a median absolute deviation of normal figures is.
_DEVIATIONS_PER_MAD = 1.4826


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, 5th and 95th percentile, interpolated linearly."""

    median: float
    p5: float
    p95: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread:
        """That of ``values``, of which there is one at least."""
        p5, median, p95 = np.percentile(values, [5, 50, 95]).tolist()
        return cls(median, p5, p95)


def robust_deviation(values: Sequence[float] | np.ndarray) -> float:
    """The standard deviation of normal ``values``, estimated by their median absolute deviation."""
    return _DEVIATIONS_PER_MAD * float(np.median(np.abs(np.asarray(values) - np.median(values))))
