"""Has the stream changed? A cumulative sum test on the prequential loss (Page, 1954).

    e_i = x_i - level - slope                         the loss of a record, less what those before it foretell
    s_i = max(0, s_{i-1} + min(e_i / deviation, MOST) - SLACK)        drift if s_i > LIMIT

The loss is foretold along a line, by double exponential smoothing (Holt, 1957), since a loss that falls because the
model learns would hide a rise behind its mean, and would look like noise. In what is foretold and in the deviation, a
residual counts as CLIP deviations at most, so that a rise does not hide itself. A record adds at most MOST - SLACK, so
that it takes two of them. After a drift the test begins anew, and is silent for LEAST records.

On independent normal losses of one law the test is wrong about once in 10,000 records, and it finds a rise by five
deviations (10 % of a loss whose records differ by 2 %) within three records (tests/online/test_drift.py counts both).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from hvdllm.plain import Json

SLACK = 1.0  # deviations that a loss may lie above what is foretold
LIMIT = 4.0
MOST = 4.0
CLIP = 2.0
LEVEL, SLOPE, SQUARE = 1 / 4, 1 / 64, 1 / 64  # the share of the newest record in each
LEAST = 16  # records before the test begins


@dataclass
class Drift:
    """The state of the test.

    Attributes:
        seen: records since it began.
        level, slope: what the records foretell is their sum.
        square: mean square of the residuals.
        sum: the cumulative sum.
        found: how many drifts it has found.
    """

    seen: int = 0
    level: float = 0.0
    slope: float = 0.0
    square: float = 0.0
    sum: float = 0.0
    found: int = 0

    def note(self, loss: float) -> bool:
        """Takes the loss of the next record. True if the stream has changed."""
        residual = loss - self.level - self.slope
        if drifted := self.seen >= LEAST and self._rises(residual):
            self.seen, self.sum, self.found = 0, 0.0, self.found + 1
        if self.seen == 0:
            self.seen, self.level, self.slope, self.square = 1, loss, 0.0, 0.0
            return drifted
        if self.seen >= LEAST:
            bound = CLIP * self._deviation
            residual = max(-bound, min(bound, residual))
        self.seen += 1
        self.level += self.slope + max(LEVEL, 1 / self.seen) * residual
        if self.seen > 2:
            self.slope += max(SLOPE, 2 / self.seen**2) * residual
        self.square += max(SQUARE, 1 / (self.seen - 1)) * (residual**2 - self.square)
        return False

    def _rises(self, residual: float) -> bool:
        self.sum = max(0.0, self.sum + min(residual / self._deviation, MOST) - SLACK)
        return self.sum > LIMIT

    @property
    def _deviation(self) -> float:
        return max(math.sqrt(self.square), abs(self.level) * 1e-6, 1e-12)

    def state(self) -> Json:
        return asdict(self)

    @staticmethod
    def of(state: Json) -> Drift:
        """The inverse of `state`. Raises TypeError or ValueError for values that are none."""
        found = Drift(**state)
        if not all(isinstance(value, int | float) for value in state.values()):
            raise ValueError("the test for drift is not said in the form of this version")
        return found
