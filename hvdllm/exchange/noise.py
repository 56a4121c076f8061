"""The gradient noise scale, from numbers that travel anyway (McCandlish et al., 2018, arXiv 1812.06162).

B_simple = tr S / |G|², in tokens. Batches far below it waste little; far above it more tokens gain little. Let g_i be
the mean of rank i over n_i tokens and g = sum n_i g_i / n the mean of all N ranks. These estimates have no bias, for
unequal counts either:

    tr S = (sum n_i |g_i|² - n |g|²) / (N - 1)          |G|² = |g|² - tr S / n

More in hvdllm/exchange/README.md, "The gradient noise scale".
"""

from __future__ import annotations


def estimate(squares: float, norm: float, tokens: float, ranks: int) -> tuple[float, float] | None:
    """(|G|², tr S) of one update; None for one rank, which has no spread. squares: sum of n_i |g_i|²; norm: |g|.

    A single estimate is noise, and its |G|² may even be negative: average both over many updates and divide the
    averages.
    """
    if ranks == 1:
        return None
    trace = (squares - tokens * norm * norm) / (ranks - 1)
    return norm * norm - trace / tokens, trace


def smooth(old: tuple[float, float] | None, new: tuple[float, float], keep: float = 0.98) -> tuple[float, float]:
    """Exponential means of numerator and denominator, each on its own."""
    if old is None:
        return new
    return tuple(keep * a + (1 - keep) * b for a, b in zip(old, new, strict=True))  # type: ignore[return-value]


def scale(means: tuple[float, float] | None) -> float | None:
    """tr S / |G|² in tokens; None where it is not known, or where |G|² cannot be told from the noise."""
    return means[1] / means[0] if means is not None and means[0] > 0 else None
