"""What every exchange keeps between two calls of the loop, as one value.

committed    tokens and steps of all ranks, and the report of the last commit, which the next commit hands out
own          what this rank has computed and not yet told the others
intervals    seconds of compute, blocked and flight, which the host reads when the device has passed them
asks         what a person asked of any rank and the loop does not know yet
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from hvdllm.device import Mark
from hvdllm.exchange.base import Commit, Report, Values, Watch
from hvdllm.exchange.meta import SLOT, MetaSum
from hvdllm.world.base import Asks

Interval = tuple[Mark, Mark]


@dataclass
class RankReport:
    """What one rank has to tell the others; what its fields mean stands in Report.

    tokens: of gradients that are committed with it
    squares: the squared norm of its gradient; which one, the exchange says
    """

    tokens: int = 0
    loss: float = 0.0
    loss_tokens: float = 0.0
    squares: float = 0.0
    compute_s: float = 0.0
    blocked_s: float = 0.0
    flight_s: float = 0.0
    cpu_s: float = 0.0
    micro_batches: float = 0.0

    def slot(self) -> dict[str, float]:
        """What the meta carries for each rank by itself."""
        return {name: getattr(self, name) for name in SLOT}

    def totals(self) -> dict[str, float]:
        """What the meta adds up over the ranks."""
        return {"loss": self.loss, "loss_tokens": self.loss_tokens, "squares": self.squares}

    def add(self, other: RankReport) -> None:
        """Adds another step of this rank, but for its squares and its tokens."""
        self.loss += other.loss
        self.loss_tokens += other.loss_tokens
        for name, value in other.slot().items():
            setattr(self, name, getattr(self, name) + value)


@dataclass
class Heard:
    """What all ranks told of one round, or of several together."""

    loss: float = 0.0
    loss_tokens: float = 0.0
    squares: float = 0.0
    slots: dict[str, list[float]] = field(default_factory=dict)

    @staticmethod
    def of(meta: MetaSum) -> Heard:
        return Heard(meta.loss, meta.loss_tokens, meta.squares, meta.slots)

    @staticmethod
    def of_report(report: Report) -> Heard:
        """What was told of a commit, from its report."""
        return Heard(report.loss_sum, report.loss_tokens, 0.0, {name: getattr(report, name) for name in SLOT})

    def __add__(self, other: Heard) -> Heard:
        slots = {k: [a + b for a, b in zip(v, other.slots[k], strict=True)] for k, v in self.slots.items()}
        return Heard(
            self.loss + other.loss, self.loss_tokens + other.loss_tokens, self.squares + other.squares,
            slots or other.slots,
        )  # fmt: skip

    def report(self, norm: float, size: int, noise_scale: float | None = None) -> Report:
        """size: of the world, for a round of which nothing was heard."""
        slots = self.slots or {name: [0.0] * size for name in SLOT}
        return Report(self.loss, self.loss_tokens, norm, noise_scale, **slots)


class Tally:
    """tokens, step: committed by all ranks. held: the report of the last commit."""

    def __init__(self) -> None:
        self.tokens = self.step = 0
        self.held: Report | None = None
        self.own = RankReport()
        self.asks = Asks()
        self.watch: Watch | None = None
        self._intervals: list[tuple[str, Mark, Mark]] = []

    # ------------------------------------------------------------------ seconds
    def passed(self, lane: str, begin: Mark, end: Mark) -> None:
        """lane: compute, blocked or flight. On a GPU the host does not wait for the marks here."""
        self._intervals.append((lane, begin, end))

    def read_seconds(self, step: int | None = None) -> None:
        """Adds the intervals so far to this rank's seconds. step: the number that `watch` is told; the next one."""
        intervals, self._intervals = self._intervals, []
        for lane, begin, end in intervals:
            begin = self._since(lane, begin, end)
            setattr(self.own, f"{lane}_s", getattr(self.own, f"{lane}_s") + begin.until(end))
            if self.watch is not None:
                self.watch(self.step + 1 if step is None else step, lane, begin, end)

    def _since(self, lane: str, begin: Mark, end: Mark) -> Mark:
        """From when on an interval counts."""
        return begin

    # ------------------------------------------------------------------ commits
    def ask(self, asks: Asks) -> None:
        """Somebody has asked a rank for this."""
        self.asks = Asks(self.asks.stop or asks.stop, self.asks.save or asks.save)

    def take_asks(self) -> Asks:
        """What was asked since the last call."""
        asks, self.asks = self.asks, Asks()
        return asks

    def commit(
        self, tokens: int, lr: float, report: Report | None, asks: Asks, staleness: float = 0.0,
        staleness_max: float | None = None, updates: int = 1,
    ) -> Commit:  # fmt: skip
        """tokens: of all ranks, in this commit. report: its own, where it is known already."""
        before, self.held = self.held, report
        self.tokens, self.step = self.tokens + tokens, self.step + updates
        return Commit(self.tokens, self.step, lr, staleness, before, asks, staleness_max, updates)

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> Values:
        """Plain values that are equal on all ranks."""
        held = asdict(self.held) if self.held is not None else None
        return {"tokens": self.tokens, "step": self.step, "held": held}

    def load(self, shared: Values, size: int | None = None) -> None:
        """size: that of this world, where it is not the one of the checkpoint."""
        self.tokens, self.step = shared["tokens"], shared["step"]
        self.held = Report(**shared["held"]) if shared["held"] else None
        if self.held is not None and size is not None:
            self.held = self.held.elsewhere(size)
