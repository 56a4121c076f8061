"""Says how far a long work is: first after EVERY seconds, and then ever more rarely, so that logs stay short."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY = 5.0  # seconds between two sentences, until RARER of all time is longer
RARER = 0.05  # an hour has about a hundred sentences


class HowFar:
    """How much of some bytes is done.

    Args:
        what: is done, as a sentence begins.
        total: bytes of all of it.
        say: gets the sentences.
        clock: seconds, from any beginning.
    """

    def __init__(
        self, what: str, total: int, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._what, self._total, self._say, self._clock = what, max(total, 1), say, clock
        self.begin(0)

    def begin(self, done: int) -> None:
        """From here on the speed is measured; what was done before took no time."""
        self._from, self._began = done, self._clock()
        self._due = self._began + EVERY

    def share(self, done: int) -> float:
        return min(done / self._total, 1.0)

    def at(self, done: int) -> None:
        """So many bytes are done."""
        now = self._clock()
        if now < self._due:
            return
        passed = now - self._began
        rate = (done - self._from) / 1e6 / passed
        self._say(f"{self._what}: {self.share(done):.0%} of {self._total / 1e6:,.0f} MB, {rate:.1f} MB/s")
        self._due = now + max(EVERY, RARER * passed)
