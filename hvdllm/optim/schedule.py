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
from hvdllm.optim.parts import Constant, Cosine, Infinite, Schedule, WarmupStableDecay


@dataclass(frozen=True)
class Way:
    """The tokens at which the warm-up, the horizon and the schedule end."""

    warmup: float
    horizon: int
    end: int


class Factor:
    """The factor of an update as a function of committed tokens, which include the update's own.

    Args:
        settings: of the schedule.
        horizon: tokens over which the schedule runs.
        batch: tokens of an update.

    Attributes:
        rewarmed: tokens at which the rate was re-warmed, for a schedule that can be.
    """

    def __init__(self, settings: Schedule, horizon: int, batch: int = 0) -> None:
        self.settings, self.rewarmed = settings, list[int]()
        end = horizon + batch if getattr(settings, "floor", 1.0) == 0 else horizon
        self._way = Way(settings.warmup * horizon, horizon, end)
        self._after: Callable[[Schedule, int, Way], float] = registry.built(registry.of("schedule", settings))

    def __call__(self, tokens: int) -> float:
        if isinstance(self.settings, Infinite):
            return self._infinite(self.settings, tokens)
        if tokens < self._way.warmup:
            return tokens / self._way.warmup
        return self._after(self.settings, tokens, self._way)

    def _infinite(self, settings: Infinite, tokens: int) -> float:
        begun, level = 0, 0.0
        for at in sorted({*self.rewarmed, *(settings.rewarm_at or ())}):
            if at > tokens:
                break
            level = _since(settings, at - begun, level)  # so that the rate is continuous where it is re-warmed
            begun = at
        return _since(settings, tokens - begun, level)

    def rewarm(self, tokens: int) -> bool:
        """Re-warms the rate from here on, if the schedule does so where the stream has changed; says whether it does.

        tokens: equal on all ranks, and not below those of any update that was made or estimated already.
        """
        if not isinstance(self.settings, Infinite) or self.settings.rewarm != "drift":
            return False
        self.rewarmed.append(tokens)
        return True


def factor(settings: Schedule, horizon: int, batch: int = 0) -> Factor:
    """The factor of the peak rate. It rises linearly from 0 over the warm-up. The arguments are those of Factor."""
    return Factor(settings, horizon, batch)


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


def infinite(settings: Infinite, tokens: int, way: Way) -> float:
    """A linear rise to 1 over warmup_tokens, half a cosine to `hold`, and then `hold` for ever (Singh et al., 2025).

    This is the curve of a run that is never re-warmed; Factor knows where it was.
    """
    return _since(settings, tokens, 0.0)


def _since(settings: Infinite, tokens: int, level: float) -> float:
    """The factor so many tokens after it began to rise from `level`."""
    if tokens < settings.warmup_tokens:
        return level + (1 - level) * tokens / settings.warmup_tokens
    progress = min(1.0, (tokens - settings.warmup_tokens) / settings.settle_tokens)
    return settings.hold + (1 - settings.hold) * (1 + math.cos(math.pi * progress)) / 2
