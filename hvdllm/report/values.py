"""Numbers from records, which may hold anything."""

from __future__ import annotations

import math

LARGEST = 1e18  # more tokens, seconds or bytes than any run will have


def number(value: object) -> float | None:
    """The value as a finite number of a size that a run can have, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        out = float(value)
    except OverflowError:
        return None
    return out if abs(out) < LARGEST else None


def measured(value: object) -> float | None:
    """The value as a loss: inf if the run diverged, None if it is no number."""
    if isinstance(value, float) and not math.isfinite(value):
        return math.inf
    return number(value)
