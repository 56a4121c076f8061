"""The pictures of a report.

They are black on white, in the colours of Okabe and Ito, which the colour-blind can tell apart. Nothing is told by
colour alone: lines have dashes and markers, and bars have hatches, so that a grey printer keeps the difference. Text is
at least 9 pt. Names from folders are drawn as they are, without mathtext or markup.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path

from hvdllm.canvas import Drawn, pyplot
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.report.figures import Figures, Line, Reach
from hvdllm.report.read import CurvePoint, History
from hvdllm.report.table import BYTES, unit

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, INK)
DASHES: tuple[Drawn, ...] = (
    "-",
    (0, (6, 2)),
    (0, (2, 1.5)),
    (0, (6, 2, 1.5, 2)),
    (0, (10, 3)),
    (0, (4, 1.5, 1, 1.5, 1, 1.5)),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 7.2  # inches, that of a printed page, so that 9 pt here are 9 pt there
COUNTS = (("billion", 1e9), ("million", 1e6), ("thousand", 1e3), ("", 1.0))
LABEL = 26  # characters of a name in a picture


def check() -> None:
    """Raises UserError if pictures cannot be made."""
    try:
        pyplot()  # imported only where pictures are asked for
    except ImportError:
        raise UserError(
            "pictures need matplotlib: pip install 'hvdllm[report]', or write a table with --out report.md"
        ) from None


def check_file(flag: str, path: Path, kinds: tuple[str, ...]) -> None:
    """Makes the folder of the file that the flag names.

    Raises UserError if it cannot be made, or if the file has none of these endings.
    """
    if path.suffix not in kinds:
        raise UserError(f"{flag} {path}: a file that ends in {', '.join(kinds)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {path}: the folder {path.parent} cannot be made ({error.strerror})") from None


@contextmanager
def _style() -> Iterator[Drawn]:
    import matplotlib

    plain = pyplot()
    settings: Drawn = {
        "font.size": 9.5, "axes.labelsize": 9.5, "xtick.labelsize": 9, "ytick.labelsize": 9.5,
        "legend.fontsize": 9, "text.parse_math": False, "svg.hashsalt": "hvdllm", "svg.fonttype": "path",
        "axes.spines.top": False, "axes.spines.right": False, "text.color": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "figure.facecolor": "white", "hatch.linewidth": 0.6,
        "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.axisbelow": True,
    }  # fmt: skip
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name in a script that the font lacks
        yield plain


def pictures(f: Figures, kind: str) -> dict[str, tuple[str, bytes]]:
    """The pictures for which there are numbers: name, what it shows, and the file as `png` or `svg`."""
    out = {}
    with _style() as pyplot:
        for name, (text, make) in PICTURES.items():
            figure = make(f, pyplot)
            if figure is None:
                continue
            file = io.BytesIO()
            figure.savefig(file, format=kind, dpi=160, metadata={"Date": None} if kind == "svg" else None)
            pyplot.close(figure)
            out[name] = (text, file.getvalue())
    return out


def looks(f: Figures) -> dict[str, Json]:
    """Colour, dashes and marker of each group, the same in every picture.

    No two of the first 168 groups look alike, and in grey no two of the first 24.
    """
    order = [group.label for group in f.comparison.groups]
    found = zip(*(islice(cycle(one), len(order)) for one in (COLOURS, DASHES, MARKERS)), strict=True)
    return {
        label: {"color": colour, "linestyle": dash, "marker": marker}
        for label, (colour, dash, marker) in zip(order, found, strict=True)
    }


def short(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


# ------------------------------------------------------------------ loss
def loss(f: Figures, pyplot: Drawn) -> Drawn:
    """The loss against tokens, seconds and bytes: each seed as a thin line, the mean of the seeds as a thick one."""
    axes_of: list[tuple[str, Callable[[CurvePoint], float | None], tuple[tuple[str, float], ...]]] = [
        (f.unit, lambda p: p.tokens, COUNTS),
        ("training seconds", lambda p: None if f.virtual else p.seconds, (("", 1.0),)),
        ("sent by a rank", lambda p: p.bytes, BYTES),
    ]
    drawn = []
    for name, quantity, scales in axes_of:
        xs = [x for run in f.runs for p in run.evals if math.isfinite(p.loss) and (x := quantity(p)) is not None]
        if xs and max(xs) > 0:
            drawn.append((name, quantity, unit(xs, scales)))
    if not drawn:
        return None
    style = looks(f)
    rows = math.ceil(len(f.lines) / 4)
    figure, axes = pyplot.subplots(
        1, len(drawn), figsize=(WIDTH, 3.5 + 0.25 * rows), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, quantity, (word, scale)) in zip(axes[0], drawn, strict=True):
        for line in f.lines:
            curves = [curve for run in line.group.runs if (curve := _curve(run, quantity))]
            _curves(axis, line, curves, scale, style[line.label])
        if f.target is not None:
            axis.axhline(f.target, color=INK, linewidth=0.9, linestyle=(0, (1, 2)), label="target")
        axis.set_xlabel(f"{word} {name}".strip())
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
    axes[0][0].set_ylabel(f"{f.metric.words}{',' * bool(f.metric.each(f.unit))}{f.metric.each(f.unit)}")
    losses = sorted(p.loss for run in f.runs for p in run.evals if math.isfinite(p.loss))
    cap = 2.5 * losses[len(losses) // 2]
    if losses[-1] > cap > losses[0]:
        axes[0][0].set_ylim(top=cap)
    if losses[0] >= 0 > axes[0][0].get_ylim()[0]:
        axes[0][0].set_ylim(bottom=0)
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, handlelength=3.4)
    return figure


def _curves(axis: Drawn, line: Line, curves: list[list[tuple[float, float]]], scale: float, style: Json) -> None:
    """Draws the curves of a group, one of each run: (x, loss), x ascending."""
    if not curves:
        return
    if len(curves) > 1:
        for curve in curves:
            axis.plot(
                [x / scale for x, _ in curve], [y for _, y in curve], color=style["color"], linewidth=0.6, alpha=0.55
            )
    mean = _mean(curves)
    axis.plot(
        [x / scale for x, _ in mean], [y for _, y in mean], linewidth=1.7, markersize=5, label=short(line.label),
        markevery=max(1, len(mean) // 8), markerfacecolor="white", markeredgewidth=1.2, **style,
    )  # fmt: skip


def _curve(run: History, quantity: Callable[[CurvePoint], float | None]) -> list[tuple[float, float]]:
    points = [(x, p.loss) for p in run.evals if math.isfinite(p.loss) and (x := quantity(p)) is not None]
    return sorted(dict(points).items())


def _mean(curves: list[list[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of several curves, where all of them are known, at the places of their evaluations (at most 200)."""
    from hvdllm.report.stats import loss_at

    low, high = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    grid = sorted({x for curve in curves for x, _ in curve if low <= x <= high})
    grid = grid[:: max(1, len(grid) // 200)]
    points = [[CurvePoint(x, y) for x, y in curve] for curve in curves]
    out = []
    for x in grid:
        ys = [y for one in points if (y := loss_at(one, [p.tokens for p in one], x)) is not None]
        if len(ys) == len(curves):
            out.append((x, sum(ys) / len(ys)))
    return out


# ------------------------------------------------------------------ streams
def stream(f: Figures, pyplot: Drawn) -> Drawn:
    """The recent prequential loss against tokens, with what is known of changes, and found."""
    if not f.streamed:
        return None
    curves: dict[str, list[list[tuple[float, float]]]] = {}
    for line in f.lines:
        for run in line.group.runs:
            points = [(p.tokens, p.recent) for p in run.streamed.points if math.isfinite(p.recent)]
            if points:
                curves.setdefault(line.label, []).append(points[:: max(1, len(points) // 1000)])
    if not curves:
        return None
    style, (word, scale) = looks(f), unit([run.streamed.points[-1].tokens for run in f.runs], COUNTS)
    drifts = [sorted({x for run in line.group.runs for x in run.streamed.drifts}) for line in f.lines]
    rows = math.ceil((len(f.lines) + 2) / 4)
    figure, axes = pyplot.subplots(
        2 if any(drifts) else 1, 1, figsize=(WIDTH, 3.6 + 0.25 * rows + 0.16 * len(f.lines) * any(drifts)), sharex=True,
        layout="constrained", squeeze=False, height_ratios=[3.2, 0.16 * len(f.lines) + 0.2] if any(drifts) else None,
    )  # fmt: skip
    axis = axes[0][0]
    for line in f.lines:
        _curves(axis, line, curves.get(line.label, []), scale, style[line.label])
    for label, x in _changes(f):
        for one in axes[:, 0]:
            one.axvline(x / scale, color=INK, linewidth=0.9, linestyle=(0, (1, 2)))
        axis.annotate(
            label, (x / scale, 1), xycoords=axis.get_xaxis_transform(), xytext=(2, -2), textcoords="offset points",
            va="top", fontsize=9,
        )  # fmt: skip
    axis.set_ylabel("recent prequential loss,\nnats a token")
    axis.set_xlim(left=0)
    if any(drifts):
        below = axes[1][0]
        for row, (line, found) in enumerate(zip(f.lines, drifts, strict=True)):
            look = {key: value for key, value in style[line.label].items() if key != "linestyle"}
            below.plot([x / scale for x in found], [row] * len(found), linestyle="none", markersize=5, **look)
        below.set_ylim(len(f.lines) - 0.5, -0.5)
        below.set_yticks([])
        below.set_ylabel("drift\nfound", rotation=0, ha="right", va="center")
    axes[-1][0].set_xlabel(f"{word} {f.unit}".strip())
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False, handlelength=3.4)
    return figure


def _changes(f: Figures) -> list[tuple[str, float]]:
    """Where the known changes are, and what to write there."""
    found: dict[tuple[int, float], None] = {}
    for run in f.runs:
        found.update({(number, at): None for number, at in run.streamed.changes.items()})
    return [(f"change {number}", at) for number, at in sorted(found)]


# ------------------------------------------------------------------ to the target
def target(f: Figures, pyplot: Drawn) -> Drawn:
    """Time (or tokens) and bytes to the target: seeds as small marks, and their mean with its interval."""
    panels: list[tuple[str, Callable[[Line], Reach], tuple[tuple[str, float], ...]]] = [
        ("training seconds to the target", lambda line: line.seconds, (("", 1.0),)),
        (f"{f.unit} to the target", lambda line: line.tokens, COUNTS),
        ("a rank sends to the target", lambda line: line.bytes, BYTES),
    ]
    if f.rank_by == "seconds":
        del panels[1]
    else:
        del panels[0]
    drawn = []
    for name, reach, scales in panels:
        values = [value for line in f.lines for value in reach(line).by_seed.values()]
        if values and max(values) > 0:
            drawn.append((name, reach, unit(values, scales)))
    if not drawn:
        return None
    style = looks(f)
    figure, axes = pyplot.subplots(
        1, len(drawn), figsize=(WIDTH, 1.3 + 0.36 * len(f.lines)), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, reach, (word, scale)) in zip(axes[0], drawn, strict=True):
        for row, line in enumerate(f.lines):
            _dot(axis, row, line, reach(line), scale, style[line.label])
        axis.set_xlim(left=0)
        axis.locator_params(axis="x", nbins=5)
        axis.set_xlabel(f"{word} {name}".strip())
        axis.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(f.lines)), [short(line.label) for line in f.lines])
    axes[0][0].set_ylim(len(f.lines) - 0.5, -0.5)
    return figure


def _dot(axis: Drawn, row: int, line: Line, reach: Reach, scale: float, style: Json) -> None:
    values = [value / scale for value in reach.by_seed.values()]
    colour, marker = style["color"], style["marker"]
    if len(values) > 1 or not line.all_reached:
        axis.scatter(
            values,
            [row + 0.27] * len(values),
            s=16,
            facecolors="none",
            edgecolors=colour,
            marker=marker,
            linewidths=0.8,
        )
    if reach.spread is not None and line.measured:
        found = reach.spread
        half = None if found.half is None else found.half / scale
        axis.errorbar(
            [found.mean / scale], [row], xerr=None if half is None else [[half], [half]], color=colour, marker=marker,
            markersize=7, capsize=4, linewidth=1.5,
        )  # fmt: skip
    else:
        axis.text(0.02, row, unranked(line), transform=axis.get_yaxis_transform(), va="center", fontsize=9)


def unranked(line: Line) -> str:
    """Why there is no mean of this group to draw."""
    if not line.reached:
        return "not reached"
    if not line.all_reached:
        return f"reached by {line.reached} of {len(line.group.runs)}"
    return "at the first evaluation already" if line.bound else "inside a warm-up" if line.warming else "not recorded"


# ------------------------------------------------------------------ where the time went
def time(f: Figures, pyplot: Drawn) -> Drawn:
    lines = [(line, line.split) for line in f.lines if line.split is not None]
    if not lines:
        return None
    figure, axis = pyplot.subplots(figsize=(WIDTH, 1.6 + 0.36 * len(lines)), layout="constrained")
    left = [0.0] * len(lines)
    names = ("compute", "compute, gradients travel (hidden)", "blocked (compute waits)", "rest")
    fills = ((BLUE, "", "white"), (SKY, "//", INK), (VERMILLION, "xx", "white"), ("#bbbbbb", "..", INK))
    for k, (name, (colour, hatch, ink)) in enumerate(zip(names, fills, strict=True)):
        values = [split.parts[k] for _, split in lines if split is not None]
        axis.barh(
            range(len(lines)),
            values,
            left=left,
            height=0.62,
            color=colour,
            hatch=hatch,
            edgecolor=ink,
            linewidth=0.4,
            label=name,
        )
        left = [a + b for a, b in zip(left, values, strict=True)]
    for row, end in enumerate(left):
        axis.text(end, row, f" {end:,.0f}" if end >= 100 else f" {end:.3g}", va="center", fontsize=9)
    axis.set_xlim(0, 1.08 * max(max(left), 1e-12))
    axis.set_yticks(range(len(lines)), [short(line.label) for line, _ in lines])
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(f"seconds a million {f.unit} (mean over ranks and runs)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


# ------------------------------------------------------------------ staleness, stragglers
def ranks(f: Figures, pyplot: Drawn) -> Drawn:
    panels: list[tuple[str, Callable[[Line], list[float]]]] = [
        (
            "staleness, updates\n(mean; small: most)",
            lambda one: [v for v in (one.stale_mean, one.stale_most) if v is not None],
        ),
        (
            "compute of slowest less\nfastest rank, % of mean",
            lambda one: [] if one.skew is None else [100 * one.skew],
        ),
        ("micro-batches of each\nrank, % of mean", lambda one: [100 * v for v in one.by_rank[:512]]),
    ]
    shown = [(name, value) for name, value in panels if any(value(line) for line in f.lines)]
    if not shown:
        return None
    style = looks(f)
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(WIDTH, 1.5 + 0.36 * len(f.lines)), sharey=True, layout="constrained", squeeze=False
    )
    for axis, (name, value) in zip(axes[0], shown, strict=True):
        stale = name.startswith("staleness")
        for row, line in enumerate(f.lines):
            colour, marker = style[line.label]["color"], style[line.label]["marker"]
            for k, x in enumerate(value(line)):
                big = not stale or k == 0
                axis.plot(
                    [x],
                    [row],
                    color=colour,
                    marker=marker,
                    markersize=7 if big else 4.5,
                    linestyle="none",
                    markerfacecolor=colour if big and not name.startswith("micro") else "none",
                )
        axis.set_xlabel(name)
        axis.grid(axis="y", visible=False)
        if name.startswith("micro"):
            low, high = axis.get_xlim()
            reach = max(5.0, 1.1 * (high - 100), 1.1 * (100 - low))
            axis.set_xlim(100 - reach, 100 + reach)
        else:
            axis.set_xlim(0, max(axis.get_xlim()[1], 1.1))
    axes[0][0].set_yticks(range(len(f.lines)), [short(line.label) for line in f.lines])
    axes[0][0].set_ylim(len(f.lines) - 0.5, -0.5)
    return figure


PICTURES: dict[str, tuple[str, Callable[[Figures, Drawn], Drawn]]] = {
    "loss": (
        "The evaluations against progress, training seconds and bytes sent; thin lines are single runs",
        loss,
    ),
    "stream": (
        "The prequential loss, of text before it was learnt, and where the stream is known and was found to change",
        stream,
    ),
    "target": ("To the target: means with 95 % intervals over seeds; small marks are seeds", target),
    "time": ("Where the time went", time),
    "ranks": ("Staleness of gradients, and how unequal the ranks were", ranks),
}
