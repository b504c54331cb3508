"""How often to save: what lies between two checkpoints, from what one costs."""

from __future__ import annotations

import math


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """The time between checkpoints that loses least, sqrt(2 C M), C being ``cost_s`` and M ``mtbf_s``.

    A first-order result for C much smaller than M: Young, A first order approximation to the optimum checkpoint
    interval, Communications of the ACM 17 (1974) 530; Daly, A higher order estimate of the optimum checkpoint
    interval for restart dumps, Future Generation Computer Systems 22 (2006) 303, whose further terms matter for C
    above a twentieth of M. C is the time for which training stands still, here the exposed part alone.
    """
    return math.sqrt(2.0 * cost_s * mtbf_s)


def interval_steps(cost_s: float, write_s: float, mtbf_s: float, step_s: float) -> int:
    """Steps between checkpoints: the best interval, but no write may begin before the last one, of ``write_s``, is
    over."""
    return max(1, round(max(best_interval_s(cost_s, mtbf_s), write_s) / step_s))
