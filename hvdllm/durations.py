"""Durations in words."""

from __future__ import annotations

FORETOLD_S = 100 * 24 * 3600.0  # what will take longer is not foretold: a stream's budget is just some large number


def duration(seconds: float) -> str:
    """A duration in words, such as `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def left(missing: float, rate: float) -> str:
    """How long the rest will take, such as `5 min 03 s left`, or "" if that is not known.

    Args:
        missing: units that are still to be trained.
        rate: units a second so far; it may be 0 or nan.
    """
    seconds = missing / rate if rate > 0 else 0.0
    return f"{duration(seconds)} left" if 0 < seconds < FORETOLD_S else ""
