"""Interpolation and intervals. Seeds are the replicates; one number a seed enters everything here.

Crossing: the first evaluation at or below the target, and the straight line from the one before it. Intervals are
Student's t. Two ways of training are compared by the ratios of runs with the same seed: a t test on their logarithms,
whose interval is exp(mean ± t s/√n).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev

from hvdllm.report.read import Point

LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean over n seeds and its 95 % interval; one seed has none."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        return None if self.low is None else self.mean - self.low


@dataclass(frozen=True)
class Paired:
    """Ratio (reference / other, geometric mean) or difference (other less reference) over `pairs` common seeds.

    noise: the larger of the two standard deviations between seeds, on the scale of the test (logarithms of a ratio).
    """

    value: float
    low: float | None
    high: float | None
    pairs: int
    noise: float
    ratio: bool

    @property
    def none(self) -> float:
        """The value that means no difference."""
        return 1.0 if self.ratio else 0.0

    @property
    def margin(self) -> float:
        """|value| on the scale of the test."""
        return abs(math.log(self.value)) if self.ratio else abs(self.value)

    @property
    def testable(self) -> bool:
        return self.low is not None

    @property
    def significant(self) -> bool:
        """The interval leaves out "no difference", and the margin is wider than the noise between seeds: with two or
        three seeds a few ratios may agree by chance."""
        if self.low is None or self.high is None or self.low <= self.none <= self.high:
            return False
        return self.margin > self.noise


@lru_cache
def t_factor(n: int) -> float:
    """Of the two-sided 95 % interval of a mean of n."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 0.5 + LEVEL / 2))


def spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    mean = fmean(values)
    if len(values) < 2 or not math.isfinite(mean):
        return Spread(mean, None, None, len(values))
    half = t_factor(len(values)) * stdev(values) / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half, len(values))


def paired(reference: dict[str, float], other: dict[str, float], *, ratio: bool) -> Paired | None:
    """By seed. None: no seed in common, or a value that has no logarithm or is not finite."""
    common = [seed for seed in reference if seed in other]
    a, b = [reference[s] for s in common], [other[s] for s in common]
    if not common or not all(math.isfinite(v) and (v > 0 or not ratio) for v in a + b):
        return None
    if ratio:
        a, b = [math.log(v) for v in a], [math.log(v) for v in b]
    differences = [x - y if ratio else y - x for x, y in zip(a, b, strict=True)]
    found = spread(differences)
    assert found is not None
    noise = max(stdev(a), stdev(b)) if len(common) > 1 else 0.0

    def back(value: float | None) -> float | None:
        return value if value is None or not ratio else math.exp(min(value, 700.0))

    value = back(found.mean)
    assert value is not None
    return Paired(value, back(found.low), back(found.high), len(common), noise, ratio)


# ------------------------------------------------------------------ curves
@dataclass(frozen=True)
class Crossing:
    """Between evaluations index - 1 and index, at this fraction. bound: at the first evaluation already, so what is
    read there is an upper bound."""

    index: int
    fraction: float
    bound: bool = False


def crossing(losses: Sequence[float], target: float) -> Crossing | None:
    """The first time that the loss is at or below the target; None: never."""
    index = next((k for k, loss in enumerate(losses) if loss <= target), None)
    if index is None:
        return None
    if index == 0:
        return Crossing(0, 1.0, bound=True)
    before, after = losses[index - 1], losses[index]
    # An evaluation that was not finite lies on no line.
    return Crossing(index, (before - target) / (before - after) if math.isfinite(before) else 1.0)


def read_off(values: Sequence[float | None], where: Crossing) -> float | None:
    """What a quantity was at the crossing; None: not recorded there."""
    after = values[where.index]
    if where.fraction == 1.0 or after is None:
        return after
    before = values[where.index - 1]
    return None if before is None else before + where.fraction * (after - before)


def loss_at(points: Sequence[Point], xs: Sequence[float | None], x: float) -> float | None:
    """The loss at x, on the line between the evaluations beside it; None outside of what was evaluated.

    inf where one of the two is not finite.
    """
    known = [(at, point.loss) for at, point in zip(xs, points, strict=True) if at is not None]
    for k, (here, loss) in enumerate(known):
        if here == x:
            return loss
        if here > x:
            if k == 0:
                return None
            before, earlier = known[k - 1]
            if not (math.isfinite(loss) and math.isfinite(earlier)):
                return math.inf
            return earlier + (loss - earlier) * (x - before) / (here - before) if here > before else loss
    return None
