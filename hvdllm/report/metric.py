"""What a report compares runs by: the validation loss, or another result of their evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hvdllm.errors import UserError

RIGHT = ("accuracy", "auc")  # shares of what is right: more is better, at most 1


@dataclass(frozen=True)
class Metric:
    """A result of evaluations. Less is better: of a share of what is right, 1 minus it is compared.

    Attributes:
        name: as `eval` records call it; that of a source of data follows after a slash, as in `loss/code`.
    """

    name: str = "loss"

    @property
    def kind(self) -> str:
        """The name without that of a source."""
        return self.name.partition("/")[0]

    @property
    def right(self) -> bool:
        """Whether it is a share of what is right."""
        return self.kind in RIGHT

    @property
    def words(self) -> str:
        """What is compared, such as `validation loss`."""
        source = self.name.partition("/")[2]
        of = f" of {source}" if source else ""
        if self.kind == "accuracy":
            return f"validation error (1 - accuracy){of}"
        return f"validation {self.short}{of}"

    @property
    def short(self) -> str:
        """The same in one word, for the head of a column."""
        if self.kind == "accuracy":
            return "error"
        return f"1 - {self.kind}" if self.right else self.kind

    def given(self, target: float) -> str:
        """The clause that says that somebody gave this target, in the numbers of the records."""
        return "the target given" + (f", {self.name} {self.of(target):g}" if self.right else "")

    def each(self, unit: str) -> str:
        """What a loss is per, such as ` nats a token`; empty for other metrics."""
        one = unit.removesuffix("s") or unit
        return f" nats a{'n' * (one[:1] in 'aeiou')} {one}" if self.kind == "loss" else ""

    def of(self, value: float) -> float:
        """What is compared, from what a record holds."""
        return 1 - value if self.right else value

    def target(self, given: float | None) -> float | None:
        """The target as it is compared. Raises UserError if the metric cannot reach it."""
        if given is None:
            return None
        if self.right and not 0 < given < 1:
            raise UserError(f"--target {given}: {self.name} is a share between 0 and 1")
        if not (math.isfinite(given) and given > 0):
            raise UserError(f"--target {given}: a {self.name} to reach is a number above 0")
        return self.of(given)


LOSS = Metric()
