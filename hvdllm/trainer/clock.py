"""The training clock: seconds since the first round, less those spent in acts.

It stops when the last rank has arrived at an act and goes on when all leave it together, so that no rank books
another's act as waiting. On virtual ranks with a simulated clock the seconds are that one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvdllm.device import now
from hvdllm.world.base import World


class Clock:
    """seconds: those of earlier lives of the run."""

    def __init__(self, world: World, seconds: float = 0.0) -> None:
        self.world, self.earlier = world, seconds
        self.start()

    def start(self) -> None:
        """The first round begins."""
        self._begin = self._since = now()
        self._before = self.earlier

    def seconds(self) -> float:
        """Of training, earlier lives included."""
        return self._before + now() - self._since

    def seconds_here(self) -> float:
        """Of training, in this process."""
        return self.seconds() - self.earlier

    def wall_s(self) -> float:
        """Since the start of this process's training, acts included."""
        return now() - self._begin

    @contextmanager
    def act(self) -> Iterator[None]:
        """Around everything that is not training. Collective."""
        self.world.sum(torch.zeros(1), "act.begin").land()
        self._before = self.seconds()
        yield
        self.world.sum(torch.zeros(1), "act.end").land()
        self._since = now()
