"""How runs learn a stream: the prequential loss, how soon they follow a change, and what they forget.

prequential loss    of all text before it was learnt, at equal tokens
to recover          after a change of the stream, the tokens until the recent prequential loss (prequential_recent)
                    is within MARGIN of its last value before the change again. It counts from the change to the
                    line between the first such record, behind one that was above, and the record before it. It is
                    0 if no record was above. It is not known if the next change, or the end, comes first
new text            the prequential loss of the first record with nothing but text behind a change: what was learnt
                    before helps with it (forward transfer)
forgetting          the mean, over the held-out slices that were evaluated at least twice, of the loss at the last
                    evaluation less the lowest that the run ever had there (Chaudhry et al., 2018, ECCV)
held-out regret     the mean, over all evaluations of a slice, of the loss less the lowest that any run of the report
                    ever had there
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import fmean

from hvdllm.report import stats
from hvdllm.report.read import CurvePoint, History
from hvdllm.report.stats import Paired, Spread, Values

MARGIN = 0.05  # of the loss before the change
MOST_CHANGES = 6  # of which a report speaks


@dataclass
class Sample:
    """One quantity of a group. The spread is None unless all of its runs have it. The difference is this minus the
    reference, or for tokens the reference over this; it is one of the report's tests."""

    by_seed: Values
    spread: Spread | None
    difference: Paired | None = None


@dataclass
class Recovery(Sample):
    """Tokens to recover from one change.

    Attributes:
        runs: that came to the change.
        back: how many of them recovered.
    """

    runs: int = 0
    back: int = 0


@dataclass
class Learnt:
    """What a group learnt of the stream.

    Attributes:
        tokens: of the stream, without replay, up to which the prequential loss counts.
        whole, bits: the prequential loss in nats a token and in bits per byte.
        recoveries, new: of each change; see above.
        forgetting, regret: see above.
    """

    tokens: float
    whole: Sample
    bits: Sample
    forgetting: Sample
    regret: Sample
    recoveries: list[Recovery] = field(default_factory=list)
    new: list[Sample] = field(default_factory=list)

    def test(self, reference: Learnt) -> None:
        """Compares this group with the reference."""
        for one, other in ((self.whole, reference.whole), (self.forgetting, reference.forgetting)):
            if one.spread is not None and other.spread is not None:
                one.difference = stats.paired(other.by_seed, one.by_seed, ratio=False)
        for mine, theirs in zip(self.recoveries, reference.recoveries, strict=True):
            if mine.spread is not None and theirs.spread is not None:
                mine.difference = stats.paired(theirs.by_seed, mine.by_seed, ratio=True)

    @property
    def tests(self) -> list[tuple[object, str]]:
        """What holds each test of this group."""
        return [(each, "difference") for each in (self.whole, self.forgetting, *self.recoveries)]


def learn(groups: list[list[History]]) -> list[Learnt | None]:
    """What each group of runs learnt; None for all of them unless all runs trained on streams."""
    runs = [run for group in groups for run in group]
    if not runs or not all(run.streamed.points for run in runs):
        return [None] * len(groups)
    tokens = min(run.streamed.points[-1].tokens * run.new_share for run in runs)
    best: dict[int, float] = {}
    for run in runs:
        for _, row in run.streamed.slices:
            for number, loss in row.items():
                best[number] = min(loss, best.get(number, math.inf))
    changes = sorted({number for run in runs for number in run.streamed.changes})[:MOST_CHANGES]
    return [_learnt(group, tokens, best, changes) for group in groups]


def _learnt(runs: list[History], tokens: float, best: dict[int, float], changes: list[int]) -> Learnt:
    def sample(values: list[float | None]) -> Sample:
        found = dict(zip(map(id, runs), values, strict=True))
        seeds = stats.by_seed(runs, lambda run: found[id(run)])
        return Sample(seeds, None if None in values else stats.spread(list(seeds.values())))

    recoveries = []
    for change in changes:
        took = [recovery(run, change) for run in runs]
        one = sample([None if value is None or math.isinf(value) else value for value in took])
        known = [value for value in took if value is not None]
        recoveries.append(Recovery(one.by_seed, one.spread, None, len(known), sum(map(math.isfinite, known))))
    return Learnt(
        tokens,
        sample([_at(run, tokens, bits=False) for run in runs]),
        sample([_at(run, tokens, bits=True) for run in runs]),
        sample([forgetting(run) for run in runs]),
        sample([regret(run, best) for run in runs]),
        recoveries,
        [sample([new_text(run, change) for run in runs]) for change in changes],
    )


def _at(run: History, tokens: float, bits: bool) -> float | None:
    """The prequential loss over so many tokens of the stream."""
    values = [(point.tokens, point.bits if bits else point.whole) for point in run.streamed.points]
    points = [CurvePoint(at, value) for at, value in values if value is not None]
    at = min(tokens / run.new_share, run.streamed.points[-1].tokens)  # rounding leads behind the last point
    return stats.loss_at(points, [point.tokens for point in points], at)


def recovery(run: History, change: int) -> float | None:
    """Tokens to recover from a change; inf if the run did not, None if it has no records on both sides of it."""
    points, changes = run.streamed.points, run.streamed.changes
    if (at := changes.get(change)) is None:
        return None
    end = min((one for one in changes.values() if one > at), default=math.inf)
    first = bisect_right(points, at, key=lambda point: point.tokens)
    after = [point for point in points[first:] if point.tokens <= end]
    if first == 0 or not after or not math.isfinite(points[first - 1].recent):
        return None
    limit = points[first - 1].recent * (1 + MARGIN)
    if all(point.recent <= limit for point in after):
        return 0.0
    for before, here in pairwise(after):
        if before.recent > limit >= here.recent:
            share = (before.recent - limit) / (before.recent - here.recent) if math.isfinite(before.recent) else 1.0
            return before.tokens + share * (here.tokens - before.tokens) - at
    return math.inf


def new_text(run: History, change: int) -> float | None:
    """The prequential loss where a new text begins; None if there is no record of it alone."""
    points, at = run.streamed.points, run.streamed.changes.get(change)
    if at is None:
        return None
    return next((here.last for before, here in pairwise(points) if before.tokens >= at), None)


def forgetting(run: History) -> float | None:
    """The mean loss of old slices now, less the lowest; None if no slice was evaluated twice."""
    rows = [row for _, row in run.streamed.slices]
    if not rows:
        return None
    old = [number for number in rows[-1] if any(number in row for row in rows[:-1])]
    lowest = {number: min(row[number] for row in rows if number in row) for number in old}
    return _mean([_less(rows[-1][number], lowest[number]) for number in old])


def regret(run: History, best: dict[int, float]) -> float | None:
    """The mean loss of slices at all evaluations, less the lowest of any run; None without slices."""
    return _mean([_less(loss, best[number]) for _, row in run.streamed.slices for number, loss in row.items()])


def _less(loss: float, lowest: float) -> float:
    return loss - lowest if math.isfinite(loss) else math.inf


def _mean(values: list[float]) -> float | None:
    return fmean(values) if values else None
