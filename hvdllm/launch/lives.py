"""Counts the lives of a run that is started again by itself, so that one that gets no further is given up."""

from __future__ import annotations

from dataclasses import dataclass

MOST_IDLE = 3


@dataclass
class Lives:
    """The lives of a run so far.

    Attributes:
        tokens: where the last life ended.
        idle: how many lives in a row got no further.
    """

    tokens: int = 0
    idle: int = 0

    def ended(self, tokens: int) -> bool:
        """Notes that a life has ended at these tokens. Returns whether the run may have another one."""
        self.idle = self.idle + 1 if tokens <= self.tokens else 0
        self.tokens = tokens
        return self.idle < MOST_IDLE
