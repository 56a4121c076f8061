"""The tables of a report, as cells of plain text. The terminal, Markdown and HTML print the same tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from hvdllm.report.figures import Figures, Line, Reach
from hvdllm.report.learning import MARGIN, Recovery, Sample
from hvdllm.report.stats import FEWEST, Paired, Spread
from hvdllm.report.verdict import count, size, verdict

NONE = "-"
MOST_ROWS = 200  # of a table that has a row for each run or difference
PARTS = {
    "matters": "NOT EQUAL",
    "compared": "compared",
    "tuned": "tuned",
    "replicate": "replicates",
    "no matter": "changes no result",
}
NAMES = 2  # names of runs that stand beside a value; if there are more, they are counted


@dataclass
class Table:
    """A table and the notes below it."""

    title: str
    head: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    left: int = 1  # how many columns, from the left, hold words; the others hold numbers


def unit(values: list[float], scales: tuple[tuple[str, float], ...]) -> tuple[str, float]:
    """The largest unit in which the largest of these values is at least 1; the last unit if there is none."""
    most = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    return next((one for one in scales if most >= one[1]), scales[-1])


BYTES = (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0))
SECONDS = (("h", 36_000.0), ("s", 1.0))


def digits(value: float) -> str:
    """A number with four significant digits, and with commas between the thousands."""
    if not math.isfinite(value):
        return "not finite"
    places = 0 if value == 0 else max(0, min(4, 3 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{places}f}"


def with_interval(found: Spread | None, scale: float = 1.0) -> str:
    if found is None:
        return NONE
    if found.low is None or found.high is None:
        return digits(found.mean / scale)
    return f"{digits(found.mean / scale)} ± {digits((found.mean - found.low) / scale)}"


def to_target(line: Line, reach: Reach, scale: float = 1.0) -> str:
    if not line.all_reached:
        runs = len(line.group.runs)
        return "not reached" if not line.reached else f"reached by {line.reached} of {runs}"
    if reach.spread is None:
        return "not recorded"
    early = "≤ " if line.bound else "in warm-up: " if line.warming else ""
    return early + (digits(reach.spread.mean / scale) if early else with_interval(reach.spread, scale))


def versus(line: Line, reference: Line) -> str:
    """The speed-up with its interval, and what the test says about it."""
    if line is reference:
        return "reference"
    return ratio(line.ratio)


def ratio(found: Paired | None) -> str:
    if found is None:
        return NONE
    if found.low is None or found.high is None:
        return f"{found.value:.2f}, {seeds(found.pairs)}"
    said = "" if found.significant else ", n.s."
    return f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f}){said}"


def loss(found: Spread | None) -> str:
    if found is None:
        return NONE
    if not math.isfinite(found.mean):
        return "not finite"
    return f"{found.mean:.4f}" + (f" ± {found.half:.4f}" if found.half is not None else "")


def difference(found: Paired | None) -> str:
    if found is None or found.low is None or found.high is None:
        return NONE if found is None else f"{found.value:+.4f}, {seeds(found.pairs)}"
    said = "" if found.significant else ", n.s."
    return f"{found.value:+.4f} ({found.low:+.4f} to {found.high:+.4f}){said}"


def seeds(n: int) -> str:
    return "one seed" if n == 1 else f"{n} seeds"


def result(f: Figures) -> Table:
    """The final table, best first."""
    if not any(run.evals for run in f.runs):
        return unevaluated(f)
    times = [s.spread.mean for s in (line.seconds for line in f.lines) if s.spread]
    sizes = [s.spread.mean for s in (line.bytes for line in f.lines) if s.spread]
    (hours, _), (sized, bytes_) = unit(times, SECONDS), unit(sizes, BYTES)
    second = 3600.0 if hours == "h" else 1.0
    what = "speed-up" if f.rank_by == "seconds" else f"fewer {f.unit}, times"
    head = [
        "",
        "seeds",
        f"{hours} to target",
        what,
        f"{sized} a rank to target",
        f"{f.unit} to target",
        "updates to target",
    ]
    if f.virtual:
        del head[2]
    at = NONE if f.equal_tokens is None else count(f.equal_tokens)
    timed = any(line.equal_seconds is not None for line in f.lines)
    if timed:
        head.append(f"{hours} to {at} {f.unit}")
    head += [f"{f.metric.short} at {at} {f.unit}", "less reference"]
    if f.equal_wall is not None:
        head.append(f"{f.metric.short} at {digits(f.equal_wall)} s wall-clock")
    rows = []
    for line in f.lines:
        row = [line.label, str(len(line.group.seeds)), to_target(line, line.seconds, second), versus(line, f.reference)]
        row += [
            to_target(line, reach, scale)
            for reach, scale in ((line.bytes, bytes_), (line.tokens, 1.0), (line.updates, 1.0))
        ]
        if f.virtual:
            del row[2]
        if timed:
            row.append(with_interval(line.equal_seconds, second))
        row += [loss(line.final), "reference" if line is f.reference else difference(line.final_difference)]
        if f.equal_wall is not None:
            row.append(loss(line.wall))
        rows.append(row)
    target = NONE if f.target is None else f"{f.target:.4f}"
    notes = [
        "±: 95 % interval over seeds, of this group alone; brackets: the interval of the difference, at the level that "
        "Holm's procedure gives it among all tests of the report; n.s.: no significant difference from the reference; "
        f"fewer than {FEWEST} seeds: values alone"
    ]
    return Table(f"To {f.metric.words} {target}, best first", head, rows, notes)


def streams(f: Figures) -> list[Table]:
    """How each group learnt the stream, and what it did after each known change; [] unless all runs trained on one."""
    learnt = [(line, line.learnt) for line in f.lines if line.learnt is not None]
    if f.reference.learnt is None:
        return []

    def less(line: Line, sample: Sample, show: Callable[[Paired | None], str] = difference) -> str:
        return "reference" if line is f.reference else show(sample.difference)

    whole, changed = [], []
    for line, one in learnt:
        whole.append([
            line.label, loss(one.whole.spread), less(line, one.whole), loss(one.bits.spread),
            loss(one.forgetting.spread), less(line, one.forgetting), loss(one.regret.spread),
        ])  # fmt: skip
    for k in range(len(f.reference.learnt.recoveries)):
        for line, one in learnt:
            recovery, new = one.recoveries[k], one.new[k]
            changed.append(
                [f"change {k + 1}", line.label, recovered(recovery), less(line, recovery, ratio), loss(new.spread)]
            )
    head = ["", "prequential loss", "less reference", "bits per byte", "forgetting", "less reference"]
    notes = [
        f"after {count(f.reference.learnt.tokens)} {f.unit} of the stream, without replay; forgetting: loss of the "
        "held-out slices at the end less the lowest that the run had there; held-out regret: their loss at all "
        "evaluations less the lowest of any run here"
    ]
    tables = [_cut(Table("On the stream", [*head, "held-out regret"], whole, notes))]
    if not changed:
        notes.append(
            "no change of the stream is known; text.source=replay of a list of texts records where each begins"
        )
        return tables
    head = ["", "", f"{f.unit} to recover", "fewer, times", "loss of the new text"]
    notes = [
        f"to recover: from the change until prequential_recent, after it was above, is within {MARGIN:.0%} of its "
        "level before the change, which is each run's own, so that who had learnt less has less to recover; loss of "
        "the new text: prequential, in the first record with nothing but text behind the change"
    ]
    return [*tables, _cut(Table("After a change of the stream", head, changed, notes, left=2))]


def recovered(found: Recovery) -> str:
    """The tokens to recover from a change, or of how many runs they are known."""
    if found.spread is not None:
        return with_interval(found.spread)
    return NONE if not found.runs else f"{found.back or 'none'} of {found.runs} runs recovered"


def work(f: Figures) -> Table:
    """What an update is, and what it costs."""
    head = [
        "",
        f"{f.unit} an update",
        "computed / committed",
        f"CPU µs a {f.unit.removesuffix('s')}",
        "blocked",
        "hidden",
        "staleness",
        "most",
    ]
    head += ["slowest over fastest rank", f"{f.metric.short} at equal wall-clock, less reference"]
    rows = []

    def cell(value: float | None, form: str, scale: float = 1.0) -> str:
        return NONE if value is None else format(value * scale, form)

    for line in f.lines:
        s = line.split
        busy = (s.compute + s.hidden + s.blocked) if s else 0.0
        rows.append([
            line.label, cell(line.tokens_per_update, ",.0f"), cell(line.computed, ".4f"),
            cell(line.cpu_s_per_token, ",.1f", 1e6), cell(s.blocked / busy if s and busy else None, ".1%"),
            cell(line.hidden_share, ".0%"), cell(line.stale_mean, ".2f"), cell(line.stale_most, ".0f"),
            cell(line.skew, ".1%"), "reference" if line is f.reference else difference(line.wall_difference),
        ])  # fmt: skip
    notes = [
        "blocked: share of the time in which compute stood still for the exchange; hidden: share of the time in which "
        "something travelled that compute went on (1 - blocked / flight); staleness: of gradients, in updates; slowest "
        "over fastest rank: the difference of their compute, over the mean; computed / committed: of runs that ended",
    ]
    if f.virtual:
        notes.append("world=virtual: times, and what follows from them, are left out")
    return Table("What an update is and costs", head, rows, notes)


def unevaluated(f: Figures) -> Table:
    """What the records of runs without an evaluation say all the same, run by run."""
    rows = []
    for line in f.lines:
        for run in line.group.runs:
            s = run.sums
            speed = s.tokens / s.seconds if s.seconds and not run.virtual else None
            rows.append([
                line.label, run.name, count(s.tokens), NONE if s.loss is None else f"{s.loss:.4f}",
                NONE if speed is None else count(speed), size(s.bytes), count(s.updates),
            ])  # fmt: skip
    head = ["", "run", f.unit, "training loss", f"{f.unit}/s", "sent by a rank", "updates"]
    notes = ["training loss: of the last record, on text that differs from run to run; nothing can be ranked by it"]
    return _cut(Table("No run has an evaluation", head, rows, notes, left=2))


def uneven(f: Figures) -> Table | None:
    """Which rank kept the others waiting, run by run. Speeds are micro-batches for each second of compute."""
    rows = []
    for line in f.lines:
        for run in line.group.runs:
            s = run.sums
            ranks = {len(s.micro_batches), len(s.compute_by_rank), len(s.blocked_by_rank)}
            if run.virtual or len(ranks) > 1 or min(ranks) < 2 or not all(s.compute_by_rank) or not s.records:
                continue
            speeds = [count / seconds for count, seconds in zip(s.micro_batches, s.compute_by_rank, strict=True)]
            busy = [c + b for c, b in zip(s.compute_by_rank, s.blocked_by_rank, strict=True)]
            slowest, stood = speeds.index(min(speeds)), [b / t for b, t in zip(s.blocked_by_rank, busy, strict=True)]
            rank, times = max(s.waited_for.items(), key=lambda pair: pair[1], default=(None, 0))
            rows.append([
                line.label, run.name, str(slowest), f"{speeds[slowest] / max(speeds):.0%}" if max(speeds) else NONE,
                f"{min(stood):.1%}", f"{max(stood):.1%}", NONE if rank is None else f"{rank}: {times} of {s.records}",
                ", ".join(str(one) for one in run.stragglers) or NONE,
            ])  # fmt: skip
    if not rows:
        return None
    head = ["", "run", "slowest rank", "its speed", "blocked, least", "most", "waited for, records", "straggler"]
    notes = [
        "its speed: micro-batches a second of compute, of the fastest rank's; blocked: share of the time of the rank "
        "that stood still least, and most; waited for: the rank that the others waited for most often, in how many "
        "`commit` records; straggler: said to delay the others persistently (trainer/straggler.py)",
    ]
    return _cut(Table("Uneven ranks", head, rows, notes, left=2))


def equal_except(f: Figures) -> Table:
    """All settings in which the runs differ, and the part that each has in the comparison."""
    rows = []
    for one in f.comparison.differences:
        said = [f"{value}: {_names(names)}" for value, names in list(one.values.items())[:8]]
        if len(one.values) > 8:
            said.append(f"{len(one.values) - 8} more values")
        rows.append([one.key, PARTS[one.part], "; ".join(said)])
    tokens: dict[str, list[str]] = {}
    for run in f.runs:
        tokens.setdefault(count(run.tokens), []).append(run.name)
    if len(tokens) > 1:
        said = [f"{value}: {_names(names)}" for value, names in list(tokens.items())[:8]]
        rows.append([f"{f.unit} committed", "compared where all are", "; ".join(said)])
    notes = [] if rows else ["The runs differ in nothing."]
    return _cut(Table("Equal except", ["setting", "part in the comparison", "values"], rows, notes, left=3))


def equal_line(f: Figures) -> str:
    """The table "Equal except" in one line, without values."""
    said = []
    for part, words in PARTS.items():
        keys = [one.key for one in f.comparison.differences if one.part == part]
        more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
        if keys:
            said.append(f"{', '.join(keys[:6])}{more} ({words})")
    return f"The runs are equal except: {'; '.join(said)}." if said else "The runs differ in nothing."


def trials(f: Figures) -> Table | None:
    """The trials of the tuned settings, and which were chosen; None if nothing was tuned."""
    if not f.comparison.tuned_by:
        return None
    rows = []
    for group in f.comparison.groups:
        for trial in group.trials:
            won = "chosen" if trial.runs is group.runs else ""
            value = f"{trial.loss:.4f}" if math.isfinite(trial.loss) else "not finite"
            seeds = len({run.seed for run in trial.runs})
            rows.append([group.label, trial.label, won, str(seeds), value])
    head = ["", "trial", "", "seeds", f"mean last {f.metric.words}"]
    return _cut(Table(f"Tuned by {', '.join(f.comparison.tuned_by)}", head, rows, left=3))


def runs(f: Figures) -> Table:
    """Every run, with its state and its notes."""
    rows = []
    for line in f.lines:
        for run in line.group.runs:
            last = run.evals[-1].loss if run.evals else None
            value = NONE if last is None else f"{last:.4f}" if math.isfinite(last) else "not finite"
            rows.append([
                line.label, run.path, "; ".join(run.notes), run.seed, run.status, str(run.lives),
                count(run.tokens), str(len(run.evals)), value,
            ])  # fmt: skip
    head = ["", "folder", "notes", "seed", "state", "lives", f.unit, "evaluations", f"last {f.metric.short}"]
    return _cut(Table("Runs", head, rows, left=3))


def left_out(f: Figures) -> Table | None:
    """The folders that were skipped, and why; None if there are none."""
    if not f.skipped:
        return None
    rows = [[one.where, one.why] for one in f.skipped]
    return _cut(Table("Skipped", ["folder", "why"], rows, left=2))


def tables(f: Figures) -> list[Table]:
    """All tables of a report, in their order."""
    every = [result(f), *streams(f), equal_except(f), trials(f), work(f), uneven(f), runs(f), left_out(f)]
    return [one for one in every if one is not None]


STREAM = "by prequential loss, tokens to recover from each change and forgetting, "


def method(f: Figures) -> list[str]:
    """How the numbers were made, and what one should know about them."""
    out = []
    if f.target is not None:
        out.append(
            f"Target: {f.metric.words} {f.target:.4f}{f.metric.each(f.unit)}, {f.target_from}. Reached: the first "
            f"evaluation at or below it; {f.unit}, seconds, bytes and updates there are interpolated linearly between "
            "that evaluation and the one before, so they are no finer than the evaluations are dense. Ranked are "
            "groups of which every run reached it after its first evaluation and behind the warm-up of its exchange "
            "and wire."
        )
    out.append(
        "Seeds are the replicates: means and 95 % intervals (Student's t) over seeds. Ratios are paired by seed: "
        "geometric mean and two-sided paired t test on their logarithms; differences of losses likewise without the "
        f"logarithm. Fewer than {FEWEST} common seeds test nothing. All {f.tests} tests of this report (each group "
        f"against the reference by the way to the target, by the {f.metric.short} at equal {f.unit} and at equal "
        f"wall-clock, {STREAM * f.streamed}"
        "and the first group against all others, as one) are corrected together by Holm's procedure: "
        "whatever is true, the chance that any difference is claimed where there is none is at most 5 %. A bracket "
        "has the level at which Holm's procedure tests its difference, so a claimed one leaves out no difference. "
        f"Bytes are not tested{', nor are losses of new texts and held-out regret' * f.streamed}."
    )
    if any(run.simulated for run in f.runs):
        out.append(
            "Seconds are those of a simulated clock (world.tokens_per_s); evaluations, saves and samples take none."
        )
    elif not f.virtual:
        out.append(
            "Seconds are those of the training clock, without evaluations, saves and samples. Wall-clock has these "
            "too, but no time before the first round or between the lives of a resumed run."
        )
    out.append("Bytes are those that rank 0 sends, by the formulas of each collective.")
    return out + [note[:1].upper() + note[1:] + "." for note in f.notes]


def _names(names: list[str]) -> str:
    return f"{len(names)} runs" if len(names) > NAMES else " and ".join(names)


def _cut(table: Table) -> Table:
    if len(table.rows) > MOST_ROWS:
        table.notes.append(f"{len(table.rows) - MOST_ROWS} further rows are left out")
        table.rows = table.rows[:MOST_ROWS]
    return table


# ------------------------------------------------------------------ Markdown
def markdown(f: Figures) -> str:
    """The report as Markdown."""
    parts = ["# Report", escape(verdict(f))]
    for table in tables(f):
        align = ["---"] * table.left + ["---:"] * (len(table.head) - table.left)
        lines = [table.head, align] if table.rows else []
        body = [
            "| " + " | ".join(row if row is align else [escape(c) for c in row]) + " |" for row in [*lines, *table.rows]
        ]
        parts += [f"## {escape(table.title)}", "\n".join(body), *(escape(note) for note in table.notes)]
    parts += ["## How", "\n".join(f"- {escape(note)}" for note in method(f))]
    return "\n\n".join(part for part in parts if part) + "\n"


def escape(text: str) -> str:
    """The text with everything escaped that Markdown or HTML would interpret."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~$#!])", r"\\\1", text)
