"""One paragraph that a reader may quote. Every clause is computed.

A difference is claimed, and a winner is named, only if the paired tests of the whole report, corrected together
(report/stats.py), find one. Else the paragraph says "no winner".
"""

from __future__ import annotations

import math
from statistics import median

from hvdllm.report.figures import Figures, Line, Winner
from hvdllm.report.stats import FEWEST, Paired, Spread

NOTHING = "No run has an evaluation with a finite loss yet, so nothing can be ranked: eval_every sets how often."


def verdict(f: Figures) -> str:
    """The paragraph."""
    parts = []
    if not f.comparison.fair:
        keys = [one.key for one in f.comparison.against]
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        parts.append(f"Not a fair comparison: the runs also differ in {', '.join(keys[:6])}{more}.")
    if f.target is None:
        parts.append(NOTHING)
        return " ".join(part for part in [*parts, _stream(f), _method(f) * f.streamed] if part)
    parts += [_clock(f), _head(f)]
    tests = [line for line in f.lines if line.ratio is not None]
    if len(f.lines) > 1:
        parts += [_others(f, tests), _missed(f), _bytes(f), _wall(f)]
    else:
        parts.append("There is one group only, so nothing to compare it with.")
    parts += [_stream(f), _tuning(f), _method(f)]
    return " ".join(part for part in parts if part)


def _clock(f: Figures) -> str:
    if any(run.simulated for run in f.runs):
        return "Seconds are those of a simulated clock."
    if f.virtual:
        return (
            "The runs are of world=virtual, logical ranks that take turns in one process: their times mean nothing, so "
            f"they are ranked by {f.unit}."
        )
    return ""


def _head(f: Figures) -> str:
    """Which group reached the target first, if that can be said."""
    where = f"{f.metric.words} {f.target:.4f} ({f.target_from})"
    ranked = [line for line in f.lines if f.measured(line)]
    if not ranked:
        if not any(line.reached for line in f.lines):
            return f"No winner: no run came to {where}."
        if any(line.bound or line.warming for line in f.lines):
            return f"No winner: no group came to {where} with all of its runs at a time that was measured."
        return f"No winner: no group came to {where} with all of its runs."
    first = ranked[0]
    took = _took(f, first)
    if len(f.lines) == 1:
        return f"{first.label} took {took} to {where}."
    won = f.winner
    if won is None:
        return f"No winner: to {where}, only {first.label} can be ranked ({took})."
    if won.significant and won.lead is not None:
        word = "first" if f.rank_by == "seconds" else f"with the fewest {f.unit}"
        lead = f"{times(won.lead.value)} {_as_good(f)} the next, {won.next.label} ({between(won.lead)})"
        return f"{first.label} came to {where} {word}, in the mean after {took}: {lead}."
    return f"No winner: to {where}, {_undecided(f, won, took)}."


def _undecided(f: Figures, won: Winner, took: str) -> str:
    """Why the group that is first in the mean is not called the winner."""
    first, other = won.first, won.next
    a, b = f.ranked(first).spread, f.ranked(other).spread
    assert a is not None and b is not None
    if a.mean == b.mean:
        return f"{first.label} and {other.label} took equally much, {took} in the mean"
    said = f"{first.label} took {took} in the mean, {other.label} {_took(f, other)}"
    if won.lead is None or not won.lead.testable:
        return f"{said}; with fewer than {FEWEST} common seeds nothing is claimed"
    return f"{said}, which is no significant difference ({why_not(won.lead)})"


def _took(f: Figures, line: Line) -> str:
    found = f.ranked(line).spread
    assert found is not None
    return amount(found, "seconds" if f.rank_by == "seconds" else f.unit)


def _as_good(f: Figures) -> str:
    return "as fast as" if f.rank_by == "seconds" else f"as frugal with {f.unit} as"


def _others(f: Figures, tests: list[Line]) -> str:
    """How each group compares with the reference."""
    if not tests:
        return ""
    name, verb = f.reference.label, _as_good(f)
    said = []
    for line in tests:
        ratio = line.ratio
        assert ratio is not None
        if not ratio.testable:
            said.append(f"{line.label} {times(ratio.value)} {verb} {name}")
        elif ratio.significant:
            said.append(f"{line.label} {times(ratio.value)} {verb} {name} ({between(ratio)})")
        else:
            said.append(f"{line.label} no significant difference from {name} ({why_not(ratio)})")
    tested = any(line.ratio and line.ratio.testable for line in tests)
    end = "" if tested else f"; fewer than {FEWEST} seeds each, so nothing can be said of noise"
    return f"Against {name}: {'; '.join(said)}{end}."


def _missed(f: Figures) -> str:
    missed = [line for line in f.lines if not line.all_reached]
    if not missed or not any(line.reached for line in f.lines):
        return ""
    said = [f"{line.label} ({line.reached} of {len(line.group.runs)} runs did)" for line in missed]
    return f"Not reached by all runs of {', '.join(said)}: no mean is taken of the others."


def _bytes(f: Figures) -> str:
    """How many bytes were sent. This is a description and no claim, because no test stands behind it."""
    known = [(line, line.bytes.spread) for line in f.lines if line.measured and line.bytes.spread]
    sent = [(line, spread.mean) for line, spread in known if spread is not None and spread.mean > 0]
    if len(sent) < 2:
        return ""
    least, most = min(sent, key=lambda pair: pair[1]), max(sent, key=lambda pair: pair[1])
    if least[1] >= 0.995 * most[1]:
        return "All sent as many bytes to get there."
    said = [f"{least[0].label} {size(least[1])}"]
    said += [f"{line.label} {size(value)}" for line, value in sent if line is f.reference and line is not least[0]]
    if most[0] not in (least[0], f.reference):
        said.append(f"{most[0].label} {size(most[1])}")
    return f"Bytes a rank sent to get there, in the mean and not tested: {', '.join(said)}."


def _wall(f: Figures) -> str:
    known = [(line, line.wall) for line in f.lines if line.wall is not None and math.isfinite(line.wall.mean)]
    if f.equal_wall is None or len(known) < 2:
        return ""
    line, spread = min(known, key=lambda pair: pair[1].mean if pair[1] else math.inf)
    assert spread is not None
    wall = f"After equal wall-clock, evaluation included ({seconds(f.equal_wall)})"
    text = f"{wall}, the lowest mean {f.metric.short} is that of {line.label}, {spread.mean:.4f}"
    test = line.wall_difference
    if test is None:
        return text + "."
    apart = f"{abs(test.value):.4f} below {f.reference.label}"
    if not test.testable:
        return f"{text}, {apart}, with too few seeds for a test."
    if test.significant:
        assert test.low is not None and test.high is not None
        return f"{text}, {apart} ({-test.high:.4f} to {-test.low:.4f})."
    return f"{text}, no significant difference from {f.reference.label}."


# ------------------------------------------------------------------ streams
def _stream(f: Figures) -> str:
    """How the groups learnt the stream, against the reference."""
    learnt = f.reference.learnt
    if learnt is None or learnt.whole.spread is None:
        return ""
    name, parts = f.reference.label, []
    others = [(line.label, line.learnt) for line in f.lines if line is not f.reference and line.learnt is not None]
    over, loss = f"{count(learnt.tokens)} {f.unit} of the stream", learnt.whole.spread.mean
    whole = f"The prequential loss of {name} over {over} is {loss:.4f}"
    parts.append(_apart(whole, "loss", [(label, one.whole.difference) for label, one in others]))
    for k, own in enumerate(learnt.recoveries):
        every = [(name, own), *((label, one.recoveries[k]) for label, one in others)]
        never = [f"{label} ({one.back} of {one.runs} runs did)" for label, one in every if one.back < one.runs]
        tests = [(label, one.difference) for label, one in every[1:]]
        if own.spread is not None:
            took = f"{name} was back at its own level after change {k + 1} in {amount(own.spread, f.unit)}"
            parts.append(_apart(took, "recovery", tests))
        if never:
            parts.append(f"Not all runs recovered from change {k + 1}, so they are not ranked: {', '.join(never)}.")
    if learnt.forgetting.spread is not None:
        lost = learnt.forgetting.spread.mean
        forgot = f"Forgetting: with {name} the held-out slices end {lost:.4f} above the lowest loss that they had"
        parts.append(_apart(forgot, "forgetting", [(label, one.forgetting.difference) for label, one in others]))
    return " ".join(parts)


def _apart(begin: str, what: str, found: list[tuple[str, Paired | None]]) -> str:
    """The sentence that says how groups differ from the reference in one quantity of the stream."""
    tests = [(label, test) for label, test in found if test is not None]
    if not any(test.testable for _, test in tests):
        return f"{begin}{f'; with fewer than {FEWEST} common seeds nothing is claimed' if tests else ''}."
    said = []
    for label, test in tests:
        assert test.low is not None and test.high is not None
        if test.ratio:
            word = f"{label} {times(test.value)} as soon ({between(test)})"
        else:
            more = "more" if test.value > 0 else "less"
            low, high = sorted((abs(test.low), abs(test.high)))
            word = f"{label} {abs(test.value):.4f} {more} ({low:.4f} to {high:.4f})"
        if test.significant:
            said.append(word)
    same = [label for label, test in tests if not test.significant]
    if same:
        said.append(f"no significant difference in {what} of {', '.join(same)}")
    return f"{begin}; {'; '.join(said)}."


def _tuning(f: Figures) -> str:
    if not f.comparison.tuned_by:
        return ""
    groups = f.comparison.groups
    count = len(groups[0].trials)
    won = []
    for group in groups:
        best = next((trial for trial in group.trials if trial.runs is group.runs), None)
        won.append(f"{group.label} {best.label if best else '-'}")
    tries = f"the best of {count} trials each" if count > 1 else "one trial each"
    return f"Tuned by {', '.join(f.comparison.tuned_by)}, {tries}: {'; '.join(won)}."


def _method(f: Figures) -> str:
    """How the tests were made, and how small a difference they could have found."""
    if not f.tests:
        return ""
    ratios = [line.ratio for line in f.lines if line.ratio is not None and line.ratio.testable]
    pairs = sorted({ratio.pairs for ratio in ratios})
    seeds = f", {pairs[0]}{f' to {pairs[-1]}' if len(pairs) > 1 else ''} seeds" if pairs else ""
    many = f"{f.tests} tests" if f.tests > 1 else "one test"
    halves = [ratio.half for ratio in ratios if not ratio.significant and ratio.half]
    seen = (
        f"; a difference below {times(math.exp(min(700.0, median(halves))))} could not have been seen" if halves else ""
    )
    return (
        f"(Paired t tests{seeds}; {many} in this report, corrected by Holm's procedure, so that a claim of any "
        f"difference where there is none has a chance of 5 %{seen}.)"
    )


# ------------------------------------------------------------------ words
def times(value: float) -> str:
    return f"{value:.2f} times" if value < 100 else f"{value:.0f} times"


def between(found: Paired) -> str:
    assert found.low is not None and found.high is not None
    return f"{found.low:.2f} to {found.high:.2f}"


def why_not(found: Paired) -> str:
    """The ratio that is not claimed, with its interval."""
    return f"{times(found.value)}, {between(found)}"


def amount(spread: Spread, what: str) -> str:
    """`81.2 s (79.0 s to 83.4 s over 3 seeds)`. what: `seconds`, or what is counted."""
    show = seconds if what == "seconds" else count
    unit = "" if what == "seconds" else f" {what}"
    if spread.low is None or spread.high is None:
        return f"{show(spread.mean)}{unit} ({spread.n} seed{'s' * (spread.n > 1)})"
    low = max(0.0, spread.low)  # with few seeds the interval may reach below nothing
    return f"{show(spread.mean)}{unit} ({show(low)} to {show(spread.high)}, {spread.n} seeds)"


def seconds(value: float) -> str:
    if abs(value) >= 36_000:
        return f"{value / 3600:,.2f} h"
    return f"{value:,.0f} s" if abs(value) >= 1000 else f"{value:.1f} s" if abs(value) >= 10 else f"{value:.3g} s"


def count(value: float) -> str:
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """An amount of bytes in decimal units; `-` if it is not known."""
    if value is None:
        return "-"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
