"""The learning rate's factor as a pure function of committed tokens: lr(tokens) = optim.lr x factor(tokens).

A schedule is a function of its settings, of the tokens that are committed with an update, and of three points: the end
of the warm-up, the horizon, and the end. If the floor is 0, the end lies one update behind the horizon, because the
last update would change nothing otherwise. The function gives the factor after the warm-up. Past the end the last value
holds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from hvdllm import registry
from hvdllm.optim.parts import Constant, Cosine, Schedule, WarmupStableDecay


@dataclass(frozen=True)
class Way:
    """The tokens at which the warm-up, the horizon and the schedule end."""

    warmup: float
    horizon: int
    end: int


def factor(settings: Schedule, horizon: int, batch: int = 0) -> Callable[[int], float]:
    """The factor of an update as a function of committed tokens, which include the update's own.

    It rises linearly from 0 over the warm-up.

    Args:
        settings: of the schedule.
        horizon: tokens over which the schedule runs.
        batch: tokens of an update.
    """
    way = Way(settings.warmup * horizon, horizon, horizon + batch if getattr(settings, "floor", 1.0) == 0 else horizon)
    after: Callable[[Schedule, int, Way], float] = registry.built(registry.of("schedule", settings))
    return lambda tokens: tokens / way.warmup if tokens < way.warmup else after(settings, tokens, way)


def constant(settings: Constant, tokens: int, way: Way) -> float:
    """The factor 1."""
    return 1.0


def cosine(settings: Cosine, tokens: int, way: Way) -> float:
    """floor + (1 - floor)(1 + cos pi p)/2, where p is the progress from the end of the warm-up to the end.

    Source: Loshchilov and Hutter, 2017.
    """
    progress = min(1.0, (tokens - way.warmup) / max(1.0, way.end - way.warmup))
    return settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * progress)) / 2


def wsd(settings: WarmupStableDecay, tokens: int, way: Way) -> float:
    """1, and then a linear fall to the floor over the last share of the horizon (Hu et al., 2024)."""
    left = min(1.0, max(0.0, way.end - tokens) / max(1.0, way.end - (1 - settings.decay) * way.horizon))
    return settings.floor + (1 - settings.floor) * left
