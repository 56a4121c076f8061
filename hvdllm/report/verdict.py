"""One paragraph that a reader may quote. Every clause is computed; a difference is claimed only where the paired test
finds one that is wider than the noise between seeds."""

from __future__ import annotations

import math

from hvdllm.report import stats
from hvdllm.report.figures import Figures, Line
from hvdllm.report.stats import Paired, Spread


def verdict(f: Figures) -> str:
    parts = []
    if not f.comparison.fair:
        keys = [one.key for one in f.comparison.against]
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        parts.append(f"Not a fair comparison: the runs also differ in {', '.join(keys[:6])}{more}.")
    if f.target is None:
        return " ".join([*parts, "No run has an evaluation with a finite loss yet, so nothing can be ranked."])
    parts.append(_head(f))
    tests = [line for line in f.lines if line.ratio is not None]
    if len(f.lines) > 1:
        parts += [_others(f, tests), _missed(f)]
        parts += [_lead(f), _bytes(f), _wall(f)]
    else:
        parts.append("There is one group only, so nothing to compare it with.")
    parts += [_tuning(f), _method(f, tests)]
    return " ".join(part for part in parts if part)


def _head(f: Figures) -> str:
    origin = "the target given" if not f.target_from else "the best that every evaluated run reached"
    where = f"validation loss {f.target:.4f} ({origin})"
    virtual = (
        "The runs are of world=virtual, logical ranks that take turns in one process: their times mean nothing, so "
        "they are ranked by tokens. "
        if f.virtual
        else ""
    )
    if any(run.simulated for run in f.runs):
        virtual = "Seconds are those of a simulated clock. "
    best = f.lines[0]
    if not best.all_reached or f.ranked(best).spread is None:
        if any(line.reached for line in f.lines):
            return f"{virtual}No group came to {where} with all of its runs."
        return f"{virtual}No run came to {where}."
    found = f.ranked(best).spread
    assert found is not None
    most = "at most " if best.bound else ""
    if len(f.lines) == 1:
        return f"{virtual}{best.label} took {most}{amount(found, f.rank_by)} to {where}."
    tied = [line for line in f.lines if line.all_reached and (s := f.ranked(line).spread) and s.mean == found.mean]
    word = "first" if f.rank_by == "seconds" else "with the fewest tokens"
    if len(tied) > 1:
        word = "equally soon" if f.rank_by == "seconds" else "with equally many tokens"
    who = " and ".join(line.label for line in tied)
    return f"{virtual}{who} came to {where} {word}, in the mean after {most}{amount(found, f.rank_by)}."


def _others(f: Figures, tests: list[Line]) -> str:
    """Each group against the reference."""
    if not tests:
        return ""
    name, verb = f.reference.label, "as fast as" if f.rank_by == "seconds" else "as frugal with tokens as"
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
    end = (
        ""
        if any(line.ratio and line.ratio.testable for line in tests)
        else "; one seed each, so nothing can be said of noise"
    )
    return f"Against {name}: {'; '.join(said)}{end}."


def _missed(f: Figures) -> str:
    missed = [line for line in f.lines if not line.all_reached]
    if not missed or not any(line.reached for line in f.lines):
        return ""
    said = [f"{line.label} ({line.reached} of {len(line.group.runs)} runs did)" for line in missed]
    return f"Not reached by all runs of {', '.join(said)}: no mean is taken of the others."


def _lead(f: Figures) -> str:
    """The first against the second, where neither is the reference: that comparison stands nowhere else."""
    first, second = f.lines[0], f.lines[1]
    if f.reference in (first, second) or not (first.all_reached and second.all_reached):
        return ""
    lead = stats.paired(f.ranked(second).by_seed, f.ranked(first).by_seed, ratio=True)
    if lead is None or not lead.testable:
        return ""
    if lead.significant:
        return f"Its lead over the next, {second.label}, is {times(lead.value)} ({between(lead)})."
    return f"Its lead over the next, {second.label}, is no significant difference ({why_not(lead)})."


def _bytes(f: Figures) -> str:
    known = [(line, line.bytes.spread) for line in f.lines if line.all_reached and line.bytes.spread]
    sent = [(line, spread.mean) for line, spread in known if spread is not None and spread.mean > 0]
    if len(sent) < 2:
        return ""
    least, most = min(sent, key=lambda pair: pair[1]), max(sent, key=lambda pair: pair[1])
    if least[1] >= 0.995 * most[1]:
        return "All sent as many bytes to get there."
    base = next((value for line, value in sent if line is f.reference), None)
    if base is not None and least[1] >= 0.995 * base:  # a tie is the reference's
        return f"Fewest bytes to get there: {f.reference.label}, {size(base)} a rank."
    against = f", {f.reference.label} {size(base)}" if base is not None and least[0] is not f.reference else ""
    return f"Fewest bytes to get there: {least[0].label}, {size(least[1])} a rank{against}."


def _wall(f: Figures) -> str:
    known = [(line, line.wall) for line in f.lines if line.wall is not None and math.isfinite(line.wall.mean)]
    if f.equal_wall is None or len(known) < 2:
        return ""
    line, spread = min(known, key=lambda pair: pair[1].mean if pair[1] else math.inf)
    assert spread is not None
    text = f"After equal wall-clock, evaluation included ({seconds(f.equal_wall)}), the lowest loss is that of "
    text += f"{line.label}, {spread.mean:.4f}"
    test = line.wall_difference
    if test is None:
        return text + "."
    apart = f"{abs(test.value):.4f} below {f.reference.label}"
    if not test.testable:
        return f"{text}, {apart}."
    if test.significant:
        assert test.low is not None and test.high is not None
        return f"{text}, {apart} ({-test.high:.4f} to {-test.low:.4f})."
    return f"{text}, no significant difference from {f.reference.label}."


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


def _method(f: Figures, tests: list[Line]) -> str:
    ratios = [line.ratio for line in tests if line.ratio is not None and line.ratio.testable]
    if not ratios:
        return ""
    pairs = sorted({ratio.pairs for ratio in ratios})
    many = f"; {len(ratios)} comparisons, not corrected for their number" if len(ratios) > 1 else ""
    seeds = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    return f"(95 % intervals; paired t test on the logarithms of ratios, {seeds} seeds{many}.)"


# ------------------------------------------------------------------ words
def times(value: float) -> str:
    return f"{value:.2f} times" if value < 100 else f"{value:.0f} times"


def between(found: Paired) -> str:
    assert found.low is not None and found.high is not None
    return f"{found.low:.2f} to {found.high:.2f}"


def why_not(found: Paired) -> str:
    """The reason that a difference is not claimed. Of a ratio."""
    if found.low is None or found.high is None:
        return "one seed"
    value = f"{times(found.value)}, {between(found)}"
    if found.low <= found.none <= found.high:
        return value
    return f"{value}, but the noise between seeds is {math.expm1(found.noise):.1%}"


def amount(spread: Spread, what: str) -> str:
    """`81.2 s (79.0 s to 83.4 s over 3 seeds)`."""
    show = seconds if what == "seconds" else count
    unit = "" if what == "seconds" else " tokens"
    if spread.low is None or spread.high is None:
        return f"{show(spread.mean)}{unit} ({spread.n} seed{'s' * (spread.n > 1)})"
    low = max(0.0, spread.low)  # with two seeds the interval may reach below nothing
    return f"{show(spread.mean)}{unit} ({show(low)} to {show(spread.high)}, {spread.n} seeds)"


def seconds(value: float) -> str:
    if abs(value) >= 36_000:
        return f"{value / 3600:,.2f} h"
    return f"{value:,.0f} s" if abs(value) >= 1000 else f"{value:.1f} s" if abs(value) >= 10 else f"{value:.3g} s"


def count(value: float) -> str:
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes, in decimal units."""
    if value is None:
        return "-"
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.0f} B"
