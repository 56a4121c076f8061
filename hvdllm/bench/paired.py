"""Compares two ways of doing the same by interleaved pairs, because a machine's speed drifts more than they differ."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """The median of paired ratios, with a 95 % interval that assumes no distribution.

    The interval is made of order statistics (binomial with n and 1/2).
    """

    median: float
    low: float
    high: float
    pairs: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def ratio(values: list[float]) -> Ratio:
    """The median of these ratios, one for each pair, and its interval.

    Raises ValueError for fewer than 6 pairs, for which no such interval exists.
    """
    ordered, n = sorted(values), len(values)
    if n < 6:
        raise ValueError(f"{n} pairs are too few for a 95 % interval")
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return Ratio(statistics.median(ordered), ordered[low], ordered[high], n)
