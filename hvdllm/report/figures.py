"""The numbers of a report. Seeds are replicates: each quantity is one number a seed (the mean over runs made with the
same one), then mean and interval over seeds.

A group of which a run never reached the target has no mean time to it: a mean of those that did would favour it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean

from hvdllm.errors import UserError
from hvdllm.report import stats
from hvdllm.report.compare import Comparison, Group, reference
from hvdllm.report.read import Point, Run, Skipped
from hvdllm.report.stats import Paired, Spread

MTOKENS = 1e6
Values = dict[str, float]  # seed → value


@dataclass(frozen=True)
class Reach:
    """How a group came to the target, of one quantity. by_seed: of the seeds that reached it and have it recorded."""

    by_seed: Values
    spread: Spread | None  # None: not reached by all, or not recorded


@dataclass
class Split:
    """Seconds a million committed tokens, means over ranks: compute with nothing travelling, compute while gradients
    travel (hidden), blocked, and the rest of the training clock."""

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
    reached: int  # runs that came to the target
    bound: bool  # a run was below the target at its first evaluation: what stands here is an upper bound
    tokens: Reach
    seconds: Reach
    bytes: Reach
    updates: Reach
    final: Spread | None  # loss at equal tokens
    final_by_seed: Values
    wall: Spread | None  # loss at equal wall-clock
    wall_by_seed: Values
    tokens_per_update: float | None
    computed: float | None  # tokens computed / committed, of runs that ended
    cpu_s_per_token: float | None
    split: Split | None
    hidden_share: float | None  # 1 - blocked / flight
    stale_mean: float | None
    stale_most: float | None
    skew: float | None  # compute of the slowest rank less that of the fastest, over the mean compute
    by_rank: list[float] = field(default_factory=list)  # micro-batches, over the mean of the ranks
    ratio: Paired | None = None  # of the ranking quantity, reference / this
    final_difference: Paired | None = None  # of the loss at equal tokens, this less reference
    wall_difference: Paired | None = None  # of the loss at equal wall-clock, this less reference

    @property
    def label(self) -> str:
        return self.group.label

    @property
    def all_reached(self) -> bool:
        return bool(self.group.runs) and self.reached == len(self.group.runs)


@dataclass
class Figures:
    """lines: best first. rank_by: seconds or tokens."""

    comparison: Comparison
    lines: list[Line]
    reference: Line
    target: float | None
    target_from: str  # the run whose best loss it is; empty: given
    rank_by: str
    equal_tokens: float | None
    equal_wall: float | None
    virtual: bool
    skipped: list[Skipped]
    notes: list[str]

    @property
    def runs(self) -> list[Run]:
        return [run for line in self.lines for run in line.group.runs]

    def ranked(self, line: Line) -> Reach:
        return line.seconds if self.rank_by == "seconds" else line.tokens


def measure(
    comparison: Comparison, skipped: list[Skipped], target: float | None = None, name: str | None = None
) -> Figures:
    """name: of the reference. Raises UserError where there is no such group."""
    groups = comparison.groups
    runs = [run for group in groups for run in group.runs]
    notes = list(comparison.notes)
    chosen, source = (target, "") if target is not None else _target(runs, notes)
    virtual = any(run.virtual for run in runs)
    timed = not virtual and any(p.seconds is not None for run in runs for p in run.evals)
    last = [run.evals[-1].tokens for run in runs if run.evals]
    equal_tokens = min(last) if last else None
    if last and min(last) < 0.99 * max(last):
        short = next(run.name for run in runs if run.evals and run.evals[-1].tokens == min(last))
        notes.append(f"losses at equal tokens are read where {short} was last evaluated")
    # Of a run that has no wall-clock there is no common one.
    ends = [run.evals[-1].wall_s for run in runs if run.evals]
    known = [end for end in ends if end is not None]
    equal_wall = min(known) if known and len(known) == len(ends) and not virtual else None
    if not virtual and known and equal_wall is None:
        notes.append("some runs do not record the time that evaluations took: there is no loss at equal wall-clock")
    first = reference(groups, name)
    lines = [_line(group, chosen, equal_tokens, equal_wall, virtual) for group in groups]
    out = Figures(
        comparison, lines, lines[groups.index(first)], chosen, source, "seconds" if timed else "tokens", equal_tokens,
        equal_wall, virtual, skipped, notes,
    )  # fmt: skip
    for line in lines:
        if line is out.reference:
            continue
        if line.all_reached and out.reference.all_reached:
            own, base = out.ranked(line).by_seed, out.ranked(out.reference).by_seed
            line.ratio = stats.paired(base, own, ratio=True)
        line.final_difference = stats.paired(out.reference.final_by_seed, line.final_by_seed, ratio=False)
        line.wall_difference = stats.paired(out.reference.wall_by_seed, line.wall_by_seed, ratio=False)
    lines.sort(key=lambda line: _place(out, line))
    if any(line.bound for line in lines):
        notes.append("marked ≤: below the target at the first evaluation already, so an upper bound")
    return out


def _target(runs: list[Run], notes: list[str]) -> tuple[float | None, str]:
    """The best loss that all runs reached, and the run that sets it. Runs without a finite evaluation set none."""
    best = {id(run): min((p.loss for p in run.evals), default=math.inf) for run in runs}
    finite = [run for run in runs if math.isfinite(best[id(run)])]
    if not finite:
        return None, ""
    if len(finite) < len(runs):
        out = ", ".join(run.name for run in runs if run not in finite)
        notes.append(f"never evaluated to a finite loss, so not reached: {out}")
    worst = max(finite, key=lambda run: best[id(run)])
    if worst.status != "finished":
        notes.append(f"the target is set by {worst.name}, which is {worst.status}; --target-loss asks for another")
    return best[id(worst)], worst.name


def _place(figures: Figures, line: Line) -> tuple[int, float, float]:
    """All reached, by the mean; then by how many did; then by the loss at equal tokens."""
    found = figures.ranked(line)
    share = line.reached / max(1, len(line.group.runs))
    final = line.final.mean if line.final and not math.isnan(line.final.mean) else math.inf
    if line.all_reached and found.spread:
        return 0, found.spread.mean, final
    return 1, -share, final


# ------------------------------------------------------------------ a group
def _by_seed(runs: list[Run], value: Callable[[Run], float | None]) -> Values:
    found: dict[str, list[float]] = {}
    for run in runs:
        if (one := value(run)) is not None:
            found.setdefault(run.seed, []).append(one)
    return {seed: fmean(values) for seed, values in found.items()}


def _line(
    group: Group, target: float | None, equal_tokens: float | None, equal_wall: float | None, virtual: bool
) -> Line:
    runs = group.runs
    where = {
        id(run): stats.crossing([p.loss for p in run.evals], target) if target is not None else None for run in runs
    }
    reached = sum(crossing is not None for crossing in where.values())

    def reach(quantity: Callable[[Point], float | None]) -> Reach:
        def of(run: Run) -> float | None:
            crossing = where[id(run)]
            return stats.read_off([quantity(p) for p in run.evals], crossing) if crossing else None

        known = [run for run in runs if of(run) is not None]
        values = _by_seed(known, of)
        return Reach(values, stats.spread(list(values.values())) if len(known) == len(runs) else None)

    def at(x: float | None, axis: Callable[[Point], float | None]) -> tuple[Values, Spread | None]:
        """A run that diverged makes its group's mean inf; one that has nothing there yet leaves no mean."""
        if x is None:
            return {}, None
        values = _by_seed(runs, lambda run: stats.loss_at(run.evals, [axis(p) for p in run.evals], x))
        return values, stats.spread(list(values.values())) if len(values) == len(group.seeds) else None

    finals, final = at(equal_tokens, lambda p: p.tokens)
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
        tokens=reach(lambda p: p.tokens),
        seconds=nothing if virtual else reach(lambda p: p.seconds),
        bytes=reach(lambda p: p.bytes),
        updates=reach(lambda p: p.updates),
        final=final,
        final_by_seed=finals,
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


def _split(runs: list[Run]) -> Split:
    """Mean over the runs of each one's seconds a million tokens, so a longer run does not weigh more."""
    found = []
    for s in (run.sums for run in runs if run.sums.tokens > 0):
        hidden = min(s.compute_s, max(0.0, s.flight_s - s.blocked_s))
        rest = max(0.0, s.seconds - s.compute_s - s.blocked_s)
        found.append([MTOKENS * v / s.tokens for v in (s.compute_s - hidden, hidden, s.blocked_s, rest)])
    return Split(*(fmean(column) for column in zip(*found, strict=True)))


def _by_rank(runs: list[Run]) -> list[float]:
    """Micro-batches of each rank over the mean; none where the runs have different numbers of ranks."""
    counts = [run.sums.micro_batches for run in runs if sum(run.sums.micro_batches) > 0]
    if not counts or len({len(one) for one in counts}) > 1:
        return []
    total = [sum(column) for column in zip(*counts, strict=True)]
    return [value / fmean(total) for value in total]


def check_target(target: float | None) -> None:
    if target is not None and not (math.isfinite(target) and target > 0):
        raise UserError(f"--target-loss {target}: a loss is a number of nats above 0")
