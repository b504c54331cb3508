"""The α–β model of a collective, fitted to times by size: T = α · steps + bytes · bus factor · β.

α is what a step costs whatever it carries, β the seconds of a byte on the busiest link (1 / β is what the bus
bandwidth of large messages tends to). Hockney, The communication challenge for MPP, Parallel Computing 20 (1994).
``steps`` and ``bus factor`` of an operation are those of a ring (``hpctrain.bench.comm.operations``).

Sizes span seven decades, so errors count relative to the time at hand: least squares of (model - T) / T, every size
with the same say, α and β not negative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hpctrain.metrics.spread import Spread

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Line:
    """``residual`` and ``worst`` are the root mean square and the largest of |model - T| / T over the sizes."""

    alpha_s: float
    beta_s_per_byte: float
    residual: float
    worst: float


@dataclass(frozen=True, slots=True)
class Fit:
    """The line through the median times, and how its two numbers spread over lines through each round's times."""

    line: Line
    alpha_s: Spread
    beta_s_per_byte: Spread

    @property
    def bandwidth_gb_per_s(self) -> float | None:
        """1 / β in 10^9 bytes per second; None where time does not grow with size."""
        beta = self.line.beta_s_per_byte
        return 1e-9 / beta if beta > 0 else None


def fit_line(size_bytes: Sequence[int], time_s: Sequence[float], steps: float, bus_factor: float) -> Line | None:
    """α and β that explain ``time_s`` at ``size_bytes``; None with fewer than two different sizes."""
    if len(set(size_bytes)) < 2:
        return None
    times = np.array(time_s, dtype=np.float64)
    columns = np.stack([np.full(len(times), float(steps)), np.array(size_bytes, dtype=np.float64) * bus_factor], axis=1)
    relative = columns / times[:, None]
    # Columns of equal norm: seconds a step and seconds a byte lie ten decades apart.
    norms = np.linalg.norm(relative, axis=0)
    solution = _nonnegative_pair(relative / norms) / norms
    errors = np.abs(relative @ solution - 1.0)
    return Line(float(solution[0]), float(solution[1]), float(np.sqrt(np.mean(errors**2))), float(errors.max()))


def fit(size_bytes: Sequence[int], rounds_s: Sequence[Sequence[float]], steps: float, bus_factor: float) -> Fit | None:
    """Fit of ``rounds_s``: for each size its times, one a round, equally many for all. None as in ``fit_line``."""
    line = fit_line(size_bytes, [float(np.median(times)) for times in rounds_s], steps, bus_factor)
    if line is None:
        return None
    lines = [fit_line(size_bytes, times, steps, bus_factor) for times in zip(*rounds_s, strict=True)]
    found = [line for line in lines if line is not None]
    return Fit(line, Spread.of([one.alpha_s for one in found]), Spread.of([one.beta_s_per_byte for one in found]))


def _nonnegative_pair(columns: Floats) -> Floats:
    """Non-negative x [2] that minimises |columns x - 1|: exact, since with two unknowns every case can be tried."""
    target = np.ones(len(columns))
    free: Floats = np.asarray(np.linalg.lstsq(columns, target, rcond=None)[0], dtype=np.float64)
    if (free >= 0).all():
        return free
    # A convex function whose minimum lies outside the quadrant has its least on an edge, where one of them is 0.
    candidates = []
    for index in (0, 1):
        edge = np.zeros(2)
        edge[index] = max(0.0, float(columns[:, index] @ target / (columns[:, index] @ columns[:, index])))
        candidates.append(edge)
    return min(candidates, key=lambda x: float(np.sum((columns @ x - target) ** 2)))
