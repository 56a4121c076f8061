"""The training clock: seconds since the first round, without those spent in acts.

The clock stops when the last rank has arrived at an act and goes on when all ranks leave it together, so no rank counts
another rank's act as waiting. On virtual ranks with a simulated clock, the seconds are those of that clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hvdllm.device import now
from hvdllm.world.base import World


class Clock:
    """The training clock of one rank.

    Args:
        world: the ranks that enter and leave acts together.
        seconds: training time of earlier lives of the run.
    """

    def __init__(self, world: World, seconds: float = 0.0) -> None:
        self.world, self.earlier = world, seconds
        self.start()

    def start(self) -> None:
        """Starts the clock; the first round begins now."""
        self._begin = self._since = now()
        self._before = self.earlier

    def seconds(self) -> float:
        """Seconds of training, earlier lives of the run included."""
        return self._before + now() - self._since

    def seconds_here(self) -> float:
        """Seconds of training in this process."""
        return self.seconds() - self.earlier

    def wall_s(self) -> float:
        """Seconds since training started in this process, acts included."""
        return now() - self._begin

    @contextmanager
    def act(self) -> Iterator[None]:
        """A context around everything that is not training, in which the clock stands still. Collective."""
        self.world.sum(torch.zeros(1), "act.begin").land()
        self._before = self.seconds()
        yield
        self.world.sum(torch.zeros(1), "act.end").land()
        self._since = now()
