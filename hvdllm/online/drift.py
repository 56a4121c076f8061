"""Has the stream changed? A cumulative sum test on the prequential loss (Page, 1954).

    z_i = (x_i - mean) / deviation        of the loss of a record, against those of the WINDOW records before it
    s_i = max(0, s_{i-1} + z_i - SLACK)   drift if s_i > LIMIT

Mean and deviation follow the loss with weights that fall exponentially, so that a loss which falls because the model
learns is no drift. On independent normal losses of one law the test is wrong about once in 1,300 records
(tests/online/test_drift.py counts it); after a drift it begins anew.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from hvdllm.plain import Json

SLACK = 0.5  # deviations that a loss may lie above the mean
LIMIT = 8.0
WINDOW = 32  # records over which mean and deviation are taken
LEAST = 16  # records before the test begins


@dataclass
class Drift:
    """The state of the test.

    Attributes:
        seen: records since it began.
        mean, square: of the losses, and of their squared differences from the mean.
        sum: the cumulative sum.
        found: how many drifts it has found.
    """

    seen: int = 0
    mean: float = 0.0
    square: float = 0.0
    sum: float = 0.0
    found: int = 0

    def note(self, loss: float) -> bool:
        """Takes the loss of the next record. True if the stream has changed."""
        if self.seen >= LEAST:
            deviation = math.sqrt(self.square) or abs(self.mean) * 1e-6 or 1e-12
            self.sum = max(0.0, self.sum + (loss - self.mean) / deviation - SLACK)
            if self.sum > LIMIT:
                self.seen, self.sum, self.found = 0, 0.0, self.found + 1
                self.mean = self.square = 0.0
        self.seen += 1
        share = max(1 / self.seen, 1 / WINDOW)
        change = loss - self.mean
        self.mean += share * change
        self.square += share * (change * (loss - self.mean) - self.square)
        return self.seen == 1 and self.found > 0

    def state(self) -> Json:
        return asdict(self)

    @staticmethod
    def of(state: Json) -> Drift:
        """The inverse of `state`. Raises TypeError or ValueError for values that are none."""
        found = Drift(**state)
        if not all(isinstance(value, int | float) for value in state.values()):
            raise ValueError("the test for drift is not said in the form of this version")
        return found
