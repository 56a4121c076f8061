"""Interpolation, intervals and tests. Seeds are the replicates: one number for each seed enters everything here.

A crossing is where the straight line to the first evaluation at or below the target, from the one before it, meets the
target. Intervals are Student's t. Two ways of training are compared by the ratios of runs with the same seed, in a
paired t test on their logarithms. So noise is how the ratios differ between seeds, not how the seeds differ.

A report makes many such tests. Holm's procedure (Scandinavian Journal of Statistics 6, 1979) keeps the probability of
claiming any difference that is not there at 5 % for all of them together, however they depend on each other. The
smallest of m p-values is compared with .05 / m, the next with .05 / (m - 1), and so on, up to the first that is not
below its bound. Fewer than three common seeds are shown as points and test nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, stdev

from hvdllm.report.read import CurvePoint, History

LEVEL = 0.95
Values = dict[str, float]  # seed: value
FEWEST = 3  # seeds; with fewer there are no intervals and no tests


@dataclass(frozen=True)
class Spread:
    """The mean over n seeds and its 95 % interval, which fewer than three seeds do not have."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @property
    def half(self) -> float | None:
        return None if self.low is None else self.mean - self.low


@dataclass(frozen=True)
class Paired:
    """A ratio (reference over other, geometric mean) or a difference (other minus reference), paired by seed.

    The interval has the level 1 - alpha, so it excludes "no difference" exactly if p is below alpha.

    Attributes:
        centre, error: the mean and its standard error, on the scale of the test (logarithms, for a ratio).
        pairs: how many seeds both have.
        ratio: whether it is a ratio.
        p: of the two-sided paired t test.
        alpha: the bound that Holm's procedure compared p with.
        significant: whether p, and every smaller p of the report, was below its bound.
    """

    centre: float
    error: float
    pairs: int
    ratio: bool
    p: float = 1.0
    alpha: float = 1 - LEVEL
    significant: bool = False

    @property
    def testable(self) -> bool:
        return self.pairs >= FEWEST

    @property
    def value(self) -> float:
        return self._back(self.centre)

    @property
    def half(self) -> float | None:
        """Half the width of the interval, on the scale of the test. No smaller difference would have been claimed."""
        return t_factor(self.pairs, self.alpha) * self.error if self.testable else None

    @property
    def low(self) -> float | None:
        return None if self.half is None else self._back(self.centre - self.half)

    @property
    def high(self) -> float | None:
        return None if self.half is None else self._back(self.centre + self.half)

    def _back(self, value: float) -> float:
        return math.exp(max(-700.0, min(value, 700.0))) if self.ratio else value


@lru_cache
def t_factor(n: int, alpha: float = 1 - LEVEL) -> float:
    """Student's t for the two-sided interval of level 1 - alpha of a mean over n."""
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, 1 - alpha / 2))


def spread(values: Sequence[float]) -> Spread | None:
    """The mean of these values and its interval; None if there are no values."""
    if not values:
        return None
    mean = fmean(values)
    if len(values) < FEWEST or not math.isfinite(mean):
        return Spread(mean, None, None, len(values))
    half = t_factor(len(values)) * stdev(values) / math.sqrt(len(values))
    return Spread(mean, mean - half, mean + half, len(values))


def paired(reference: dict[str, float], other: dict[str, float], *, ratio: bool) -> Paired | None:
    """Compares two ways of training, each a dict from seed to value.

    Returns None if they have no seed in common, if a value is not finite, or, for a ratio, if one has no logarithm.
    """
    common = [seed for seed in reference if seed in other]
    a, b = [reference[s] for s in common], [other[s] for s in common]
    if not common or not all(math.isfinite(v) and (v > 0 or not ratio) for v in a + b):
        return None
    if ratio:
        a, b = [math.log(v) for v in a], [math.log(v) for v in b]
    differences = [x - y if ratio else y - x for x, y in zip(a, b, strict=True)]
    centre, n = fmean(differences), len(differences)
    error = stdev(differences) / math.sqrt(n) if n >= FEWEST else 0.0
    return Paired(centre, error, n, ratio, _p(centre, error, n, max(map(abs, a + b))))


def _p(centre: float, error: float, n: int, largest: float) -> float:
    from scipy.special import stdtr

    if n < FEWEST or abs(centre) <= 1e-12 * max(largest, 1.0):  # rounding is no difference
        return 1.0
    return 2 * float(stdtr(n - 1, -abs(centre) / error)) if error else 0.0


def holm(tests: Sequence[Paired]) -> list[Paired]:
    """The same tests in the same order, with the result of Holm's procedure over all that are testable.

    Those after the first that fails are shown at its level.
    """
    order = sorted((k for k, test in enumerate(tests) if test.testable), key=lambda k: tests[k].p)
    out, holds, alpha = list(tests), True, 1 - LEVEL
    for place, k in enumerate(order):
        if holds:
            alpha = (1 - LEVEL) / (len(order) - place)
            holds = tests[k].p < alpha
        out[k] = replace(tests[k], alpha=alpha, significant=holds)
    return out


def by_seed(runs: Sequence[History], value: Callable[[History], float | None]) -> Values:
    """The mean of a value over the runs of each seed, without those that have none."""
    found: dict[str, list[float]] = {}
    for run in runs:
        if (one := value(run)) is not None:
            found.setdefault(run.seed, []).append(one)
    return {seed: fmean(values) for seed, values in found.items()}


# ------------------------------------------------------------------ curves
@dataclass(frozen=True)
class Crossing:
    """Where a run crosses the target: between evaluations index - 1 and index, at this fraction of the way.

    `bound` says that the first evaluation was below the target already, so what is read there is an upper bound.
    """

    index: int
    fraction: float
    bound: bool = False


def crossing(losses: Sequence[float], target: float) -> Crossing | None:
    """The first time that the loss is at or below the target; None if it never is."""
    index = next((k for k, loss in enumerate(losses) if loss <= target), None)
    if index is None:
        return None
    if index == 0:
        return Crossing(0, 1.0, bound=True)
    before, after = losses[index - 1], losses[index]
    # There is no line from an evaluation that was not finite.
    return Crossing(index, (before - target) / (before - after) if math.isfinite(before) else 1.0)


def read_off(values: Sequence[float | None], where: Crossing) -> float | None:
    """The value of a quantity at the crossing; None if it was not recorded there."""
    after = values[where.index]
    if where.fraction == 1.0 or after is None:
        return after
    before = values[where.index - 1]
    return None if before is None else before + where.fraction * (after - before)


def loss_at(points: Sequence[CurvePoint], xs: Sequence[float | None], x: float) -> float | None:
    """The loss at x, on the line between the evaluations around it.

    It is None outside of what was evaluated, and inf if one of the two evaluations is not finite.
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
