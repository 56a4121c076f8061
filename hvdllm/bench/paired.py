"""Comparing two ways of doing the same by interleaved pairs, since a machine's speed drifts more than they differ."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """Median of paired ratios with its distribution-free 95 % interval (order statistics, binomial in n and 1/2)."""

    median: float
    low: float
    high: float
    pairs: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def ratio(values: list[float]) -> Ratio:
    """values: one ratio a pair; at least 6, below which no such interval exists."""
    ordered, n = sorted(values), len(values)
    if n < 6:
        raise ValueError(f"{n} pairs are too few for a 95 % interval")
    reach = 0.98 * math.sqrt(n)
    low, high = max(0, math.floor(n / 2 - reach)), min(n - 1, math.ceil(n / 2 + reach))
    return Ratio(statistics.median(ordered), ordered[low], ordered[high], n)
