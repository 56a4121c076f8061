"""Stability bounds of outer optimizers, pure functions: what check.py refuses by."""

from __future__ import annotations

import math


def outer_rate_below(momentum: float, late: bool = False) -> float:
    """The bound on lr x q of torch's Nesterov SGD on mean deltas, on a quadratic where a round of local steps shrinks
    the distance to the optimum by 1 - q, 0 < q <= 1. Late: the delta of one round is applied after the next.

    At once: 2 (1+μ) / (1+2μ). Late, with p(z) = z³ - (1+μ) z² + (μ + a (1+μ)) z - aμ and a = lr q: Jury's last
    condition a²μ² + a (1-μ²) < 1-μ. For μ of 0, .5, .9: 2, 1.5, 1.357 and 1, .562, .253.
    """
    if not late:
        return 2 * (1 + momentum) / (1 + 2 * momentum)
    if momentum == 0:
        return 1.0
    b, c = 1 - momentum**2, 1 - momentum
    return (math.sqrt(b * b + 4 * momentum**2 * c) - b) / (2 * momentum**2)
