"""The learning rate's factor as a pure function of committed tokens: lr(tokens) = optim.lr x factor(tokens)."""

from __future__ import annotations

import math
from collections.abc import Callable

from hvdllm.config.schema import Constant, Cosine, Schedule, WarmupStableDecay


def factor(settings: Schedule, horizon: int, batch: int = 0) -> Callable[[int], float]:
    """horizon: tokens over which the schedule runs. batch: of an update. The factor of an update includes its own
    tokens. A floor of 0 lies one update behind the horizon, else the last one would change nothing.

    Linear from 0 over the warm-up; then 1 (constant); or floor + (1 - floor)(1 + cos pi p)/2 with p the
    progress from the warm-up's end to the horizon (cosine; Loshchilov and Hutter, 2017); or 1 and a linear
    fall to the floor over the last share (warm-up, stable, decay; Hu et al., 2024). Past the end the last value
    holds.
    """
    warmup = settings.warmup * horizon
    end = horizon + batch if getattr(settings, "floor", 1.0) == 0 else horizon

    def after(tokens: int) -> float:
        if isinstance(settings, Cosine):
            progress = min(1.0, (tokens - warmup) / max(1.0, end - warmup))
            return settings.floor + (1 - settings.floor) * (1 + math.cos(math.pi * progress)) / 2
        if isinstance(settings, WarmupStableDecay):
            left = min(1.0, max(0.0, end - tokens) / max(1.0, end - (1 - settings.decay) * horizon))
            return settings.floor + (1 - settings.floor) * left
        assert isinstance(settings, Constant)
        return 1.0

    return lambda tokens: tokens / warmup if tokens < warmup else after(tokens)
