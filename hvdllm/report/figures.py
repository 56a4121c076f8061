"""The numbers of a report.

Seeds are the replicates. Each quantity is one number for each seed (the mean, if several runs have the same seed), and
then a mean and an interval over the seeds.

Only what was measured is ranked. If a run of a group never reached the target, the group has no mean time to it, since
the mean of the others would favour it. If a run is below the target at its first evaluation, there is an upper bound
and no time. If a run reached the target while its exchange or wire still warmed up, it has trained by another algorithm
until there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from statistics import fmean

from hvdllm.report import stats
from hvdllm.report.compare import Comparison, Group, reference
from hvdllm.report.learning import Learnt, learn
from hvdllm.report.metric import Metric
from hvdllm.report.read import CurvePoint, History, Skipped
from hvdllm.report.stats import Paired, Spread, Values

MTOKENS = 1e6


@dataclass(frozen=True)
class Reach:
    """How much of one quantity a group needed to reach the target.

    `by_seed` has the seeds that reached it and have recorded the quantity.
    """

    by_seed: Values
    spread: Spread | None  # None if not all runs reached it, or if it was not recorded


@dataclass
class Split:
    """Where the training time went: seconds for a million committed tokens, as means over the ranks.

    Attributes:
        compute: computing while nothing travelled.
        hidden: computing while gradients travelled.
        blocked: standing still for the exchange.
        rest: the rest of the training clock.
    """

    compute: float
    hidden: float
    blocked: float
    rest: float

    @property
    def parts(self) -> tuple[float, float, float, float]:
        return self.compute, self.hidden, self.blocked, self.rest


@dataclass
class Line:
    """A group and its numbers."""

    group: Group
    reached: int  # how many runs reached the target
    bound: bool  # a run was below the target at its first evaluation, so these numbers are upper bounds
    warming: bool  # a run reached the target before the warm-up of its exchange or wire was over
    tokens: Reach
    seconds: Reach
    bytes: Reach
    updates: Reach
    final: Spread | None  # loss at equal tokens
    final_by_seed: Values
    equal_seconds: Spread | None  # training seconds to equal tokens
    wall: Spread | None  # loss at equal wall-clock
    wall_by_seed: Values
    tokens_per_update: float | None
    computed: float | None  # computed tokens over committed ones, for runs that have ended
    cpu_s_per_token: float | None
    split: Split | None
    hidden_share: float | None  # 1 - blocked / flight
    stale_mean: float | None
    stale_most: float | None
    skew: float | None  # compute of the slowest rank minus that of the fastest, over the mean compute
    by_rank: list[float] = field(default_factory=list)  # micro-batches of each rank, over the mean of the ranks
    ratio: Paired | None = None  # the reference over this, in the quantity that ranks
    final_difference: Paired | None = None  # loss at equal tokens, this minus the reference
    wall_difference: Paired | None = None  # loss at equal wall-clock, this minus the reference
    learnt: Learnt | None = None  # of a stream; None unless every run of the report trained on one

    @property
    def label(self) -> str:
        return self.group.label

    @property
    def all_reached(self) -> bool:
        return bool(self.group.runs) and self.reached == len(self.group.runs)

    @property
    def measured(self) -> bool:
        """Whether the way of all runs to the target was measured, so that the group may be ranked by it."""
        return self.all_reached and not self.bound and not self.warming


@dataclass(frozen=True)
class Winner:
    """What can be said of the group that is first in the mean.

    Attributes:
        first: that group.
        next: the second group.
        lead: of the first over the second; None if they have no seed in common.
        significant: whether the first differs from every other ranked group. This is one test of the report.
    """

    first: Line
    next: Line
    lead: Paired | None
    significant: bool


@dataclass
class Figures:
    """All numbers of a report.

    `lines` begin with the best group. `rank_by` is `seconds` or `tokens`. `tests` is the number of paired tests that
    share the report's 5 %.
    """

    comparison: Comparison
    lines: list[Line]
    reference: Line
    target: float | None
    target_from: str  # who chose it, in words
    rank_by: str
    equal_tokens: float | None
    equal_wall: float | None
    virtual: bool
    skipped: list[Skipped]
    notes: list[str]
    winner: Winner | None = None  # None if fewer than two groups can be ranked
    tests: int = 0

    @property
    def metric(self) -> Metric:
        """What the runs are compared by."""
        return self.runs[0].metric

    @property
    def unit(self) -> str:
        """What the runs count."""
        return self.runs[0].unit

    @property
    def runs(self) -> list[History]:
        return [run for line in self.lines for run in line.group.runs]

    @property
    def streamed(self) -> bool:
        """Whether all runs trained on streams."""
        return self.reference.learnt is not None

    def ranked(self, line: Line) -> Reach:
        return line.seconds if self.rank_by == "seconds" else line.tokens

    def measured(self, line: Line) -> bool:
        return line.measured and self.ranked(line).spread is not None


def measure(
    comparison: Comparison, skipped: list[Skipped], target: float | None = None, name: str | None = None
) -> Figures:
    """All numbers of a report.

    Args:
        comparison: the groups.
        skipped: the folders that were left out.
        target: the validation loss to reach; None to take the one that the runs name, or else to choose one.
        name: of the group that is the reference; None to choose it.

    Raises UserError if there is no group of that name.
    """
    groups = comparison.groups
    runs = [run for group in groups for run in group.runs]
    notes = list(comparison.notes)
    chosen, source = _target(runs, target, notes)
    virtual = any(run.virtual for run in runs)
    timed = not virtual and any(p.seconds is not None for run in runs for p in run.evals)
    last = [run.evals[-1].tokens for run in runs if run.evals]
    equal_tokens = min(last) if last else None
    if last and min(last) < 0.99 * max(last):
        short = next(run.name for run in runs if run.evals and run.evals[-1].tokens == min(last))
        notes.append(f"losses at equal {runs[0].unit} are read where {short} was last evaluated")
    # If one run has not recorded the wall-clock, there is no common one.
    ends = [run.evals[-1].wall_s for run in runs if run.evals]
    known = [end for end in ends if end is not None]
    equal_wall = min(known) if known and len(known) == len(ends) and not virtual else None
    if not virtual and known and equal_wall is None:
        notes.append("some runs do not record the time that evaluations took: there is no loss at equal wall-clock")
    first = reference(groups, name)
    lines = [_line(group, chosen, equal_tokens, equal_wall, virtual) for group in groups]
    for line, learnt in zip(lines, learn([group.runs for group in groups]), strict=True):
        line.learnt = learnt
    out = Figures(
        comparison, lines, lines[groups.index(first)], chosen, source, "seconds" if timed else "tokens", equal_tokens,
        equal_wall, virtual, skipped, notes,
    )  # fmt: skip
    lines.sort(key=lambda line: _place(out, line))
    _test(out)
    if any(line.bound for line in lines):
        notes.append(
            "marked ≤: below the target at the first evaluation already, so an upper bound, which is not ranked; a "
            "smaller eval_every or a harder --target measures it"
        )
    if warming := [line.label for line in lines if line.warming and not line.bound]:
        notes.append(
            f"{', '.join(warming)} came to the target before the warm-up of exchange or wire was over, so by another "
            "algorithm: not ranked; a harder --target lies behind it"
        )
    return out


def _test(f: Figures) -> None:
    """Makes all tests of the report and corrects them together.

    Each group is tested against the reference, by its way to the target, by both losses, and by how it learns a stream
    (learning.py). The group that is first in the mean is tested against every other one.
    """
    for line in f.lines:
        if line is f.reference:
            continue
        if line.measured and f.reference.measured:
            line.ratio = stats.paired(f.ranked(f.reference).by_seed, f.ranked(line).by_seed, ratio=True)
        line.final_difference = stats.paired(f.reference.final_by_seed, line.final_by_seed, ratio=False)
        line.wall_difference = stats.paired(f.reference.wall_by_seed, line.wall_by_seed, ratio=False)
        if line.learnt is not None and f.reference.learnt is not None:
            line.learnt.test(f.reference.learnt)
    names = ("ratio", "final_difference", "wall_difference")
    known: list[tuple[object, str]] = [(line, name) for line in f.lines for name in names]
    known += [each for line in f.lines if line.learnt is not None for each in line.learnt.tests]
    known = [(owner, name) for owner, name in known if getattr(owner, name) is not None]
    first, *others = [line for line in f.lines if f.measured(line)] or [f.reference]
    leads = [stats.paired(f.ranked(other).by_seed, f.ranked(first).by_seed, ratio=True) for other in others]
    # The first in the mean is the winner if it differs from all others. Its difference from those that are not the
    # reference is one more test, whose p-value is the largest of their p-values.
    apart = [lead for other, lead in zip(others, leads, strict=True) if f.reference not in (first, other)]
    testable = [lead for lead in apart if lead is not None and lead.testable]
    weakest = [max(testable, key=lambda lead: lead.p)] if testable and len(testable) == len(apart) else []
    corrected = stats.holm([*(getattr(owner, name) for owner, name in known), *weakest])
    for (owner, name), test in zip(known, corrected, strict=False):
        setattr(owner, name, test)
    f.tests = sum(test.testable for test in corrected)
    if not others:
        return
    against = others if first is f.reference else [first] if f.reference in others else []
    needed = [line.ratio for line in against] + (corrected[len(known) :] or apart)
    won = all(test is not None and test.significant for test in needed)
    lead, last = leads[0], needed[-1] if f.reference not in (first, others[0]) else needed[0]
    if lead is not None and last is not None:
        lead = replace(lead, alpha=last.alpha, significant=won)
    f.winner = Winner(first, others[0], lead, won)


# ------------------------------------------------------------------ the target
def _target(runs: list[History], given: float | None, notes: list[str]) -> tuple[float | None, str]:
    """The target, and who chose it, in words.

    It is the one that was given, or else the one that all runs name (target_loss), or else the best loss that all of
    them reached. If that loss lies inside a warm-up or before a first evaluation, the next one that does not is taken.
    """
    metric = runs[0].metric
    if given is not None:
        return given, metric.given(given)
    named = {run.settings.get("target_loss", "null") for run in runs} if metric.name == "loss" else {"null"}
    if len(named) == 1 and (text := named.pop()) != "null":
        try:
            return float(text), "the target that the runs name"
        except ValueError:
            notes.append(f"target_loss={text} is no loss")
    elif len(named) > 1:
        notes.append("the runs name different targets (target_loss), so none of them is taken")
    best = {id(run): min((p.loss for p in run.evals), default=math.inf) for run in runs}
    finite = [run for run in runs if math.isfinite(best[id(run)])]
    if not finite:
        return None, ""
    if len(finite) < len(runs):
        out = ", ".join(run.name for run in runs if run not in finite)
        notes.append(f"never evaluated to a finite loss, so not reached: {out}")
    candidates = sorted(finite, key=lambda run: -best[id(run)])
    worst = candidates[0]
    chosen = next((run for run in candidates if not any(_early(one, best[id(run)]) for one in finite)), worst)
    if chosen is not worst:
        early = next(one for one in finite if _early(one, best[id(worst)]))
        notes.append(
            f"the best {metric.short} that all runs reached, {best[id(worst)]:.4f}, lies before the first evaluation "
            f"of {early.name} or inside its warm-up, so a lower one is the target; a target_loss named before the runs "
            "is better than either"
        )
    if chosen.status != "finished":
        notes.append(f"the target is set by {chosen.name}, which is {chosen.status}; --target asks for another")
    which = "that every evaluated run reached" if chosen is worst else "that lies behind every warm-up"
    return best[id(chosen)], f"the best {metric.short} {which}, set by {chosen.name}"


def _early(run: History, target: float) -> bool:
    """Whether the run reached this target too early for a measurement of its own algorithm."""
    where = stats.crossing([p.loss for p in run.evals], target)
    return where is not None and (where.bound or _warming(run, where))


def _warming(run: History, where: stats.Crossing) -> bool:
    tokens = stats.read_off([p.tokens for p in run.evals], where)
    return tokens is not None and tokens <= run.warmup_tokens


def _place(figures: Figures, line: Line) -> tuple[int, float, float]:
    """The key to sort groups by, best first.

    Groups that are ranked come first, by their mean. The others follow, by how many of their runs reached the target,
    and then by the loss at equal tokens.
    """
    found = figures.ranked(line)
    share = line.reached / max(1, len(line.group.runs))
    final = line.final.mean if line.final and not math.isnan(line.final.mean) else math.inf
    if figures.measured(line):
        assert found.spread is not None
        return 0, found.spread.mean, final
    return 1, -share, final


# ------------------------------------------------------------------ a group
def _line(
    group: Group, target: float | None, equal_tokens: float | None, equal_wall: float | None, virtual: bool
) -> Line:
    runs = group.runs
    where = {
        id(run): stats.crossing([p.loss for p in run.evals], target) if target is not None else None for run in runs
    }
    reached = sum(crossing is not None for crossing in where.values())

    def reach(quantity: Callable[[CurvePoint], float | None]) -> Reach:
        def of(run: History) -> float | None:
            crossing = where[id(run)]
            return stats.read_off([quantity(p) for p in run.evals], crossing) if crossing else None

        known = [run for run in runs if of(run) is not None]
        values = stats.by_seed(known, of)
        return Reach(values, stats.spread(list(values.values())) if len(known) == len(runs) else None)

    def at(x: float | None, axis: Callable[[CurvePoint], float | None]) -> tuple[Values, Spread | None]:
        """The loss at x, by seed, and its mean.

        A run that diverged makes the mean inf. If a run has not come to x yet, there is no mean.
        """
        if x is None:
            return {}, None
        values = stats.by_seed(runs, lambda run: stats.loss_at(run.evals, [axis(p) for p in run.evals], x))
        return values, stats.spread(list(values.values())) if len(values) == len(group.seeds) else None

    def seconds(run: History) -> float | None:
        """The training seconds at equal tokens, on the line between the evaluations around them."""
        timed = [CurvePoint(p.tokens, p.seconds) for p in run.evals if p.seconds is not None]
        return None if equal_tokens is None else stats.loss_at(timed, [p.tokens for p in timed], equal_tokens)

    finals, final = at(equal_tokens, lambda p: p.tokens)
    took = {} if virtual else stats.by_seed(runs, seconds)
    walls, wall = at(equal_wall, lambda p: p.wall_s)
    sums = [run.sums for run in runs if run.sums.tokens > 0]
    updates = sum(s.updates for s in sums)
    compute = sum(s.compute_s for s in sums)
    flight, blocked = sum(s.flight_s for s in sums), sum(s.blocked_s for s in sums)
    tokens = sum(s.tokens for s in sums)
    ended = [run for run in runs if run.computed is not None and run.tokens > 0]
    nothing = Reach({}, None)
    return Line(
        group,
        reached=reached,
        bound=any(crossing is not None and crossing.bound for crossing in where.values()),
        warming=any((crossing := where[id(run)]) is not None and _warming(run, crossing) for run in runs),
        tokens=reach(lambda p: p.tokens),
        seconds=nothing if virtual else reach(lambda p: p.seconds),
        bytes=reach(lambda p: p.bytes),
        updates=reach(lambda p: p.updates),
        final=final,
        final_by_seed=finals,
        equal_seconds=stats.spread(list(took.values())) if len(took) == len(group.seeds) else None,
        wall=wall,
        wall_by_seed=walls,
        tokens_per_update=tokens / updates if updates else None,
        computed=sum(run.computed or 0.0 for run in ended) / sum(run.tokens for run in ended) if ended else None,
        cpu_s_per_token=sum(s.cpu_s for s in sums) / tokens if tokens and any(s.cpu_s for s in sums) else None,
        split=None if virtual or not tokens else _split(runs),
        hidden_share=max(0.0, 1 - blocked / flight) if flight > 0 and not virtual else None,
        stale_mean=sum(s.stale for s in sums) / updates if updates else None,
        stale_most=max((s.stale_most for s in sums), default=None),
        skew=sum(s.skew_s for s in sums) / compute if compute > 0 and not virtual else None,
        by_rank=_by_rank(runs),
    )


def _split(runs: list[History]) -> Split:
    """The mean over the runs. Each counts by its seconds for a million tokens, so a longer run weighs no more."""
    found = []
    for s in (run.sums for run in runs if run.sums.tokens > 0):
        hidden = min(s.compute_s, max(0.0, s.flight_s - s.blocked_s))
        rest = max(0.0, s.seconds - s.compute_s - s.blocked_s)
        found.append([MTOKENS * v / s.tokens for v in (s.compute_s - hidden, hidden, s.blocked_s, rest)])
    return Split(*(fmean(column) for column in zip(*found, strict=True)))


def _by_rank(runs: list[History]) -> list[float]:
    """The micro-batches of each rank over their mean; empty if the runs have different numbers of ranks."""
    counts = [run.sums.micro_batches for run in runs if sum(run.sums.micro_batches) > 0]
    if not counts or len({len(one) for one in counts}) > 1:
        return []
    total = [sum(column) for column in zip(*counts, strict=True)]
    return [value / fmean(total) for value in total]
