"""The gradient noise scale, from what travels anyway (McCandlish et al., 2018, arXiv 1812.06162).

B_simple = tr S / |G|², in tokens: batches far below it waste little, far above it little is gained. With rank means
g_i over n_i tokens, g = sum n_i g_i / n and N ranks, without bias for unequal counts too (hvdllm/exchange/README.md):

    tr S = (sum n_i |g_i|² - n |g|²) / (N - 1)          |G|² = |g|² - tr S / n
"""

from __future__ import annotations


def estimate(squares: float, norm: float, tokens: float, ranks: int) -> tuple[float, float] | None:
    """(|G|², tr S) of one update. squares: sum of n_i |g_i|²; norm: |g|. None for one rank, which has no spread.

    One estimate is noise, |G|² may even be negative: average both over many updates and divide the averages.
    """
    if ranks == 1:
        return None
    trace = (squares - tokens * norm * norm) / (ranks - 1)
    return norm * norm - trace / tokens, trace


def smooth(old: tuple[float, float] | None, new: tuple[float, float], keep: float = 0.98) -> tuple[float, float]:
    """Exponential means of numerator and denominator, each by itself."""
    if old is None:
        return new
    return tuple(keep * a + (1 - keep) * b for a, b in zip(old, new, strict=True))  # type: ignore[return-value]


def scale(means: tuple[float, float] | None) -> float | None:
    """tr S / |G|² in tokens; None where it is not known or |G|² drowns in the noise."""
    return means[1] / means[0] if means is not None and means[0] > 0 else None
