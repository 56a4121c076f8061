"""The picture of `hvdllm bench exchange`: where the time of a step goes, with one bar for each case."""

from __future__ import annotations

import re
from pathlib import Path

from hvdllm.canvas import pyplot
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.report.draw import check_file

KINDS = (".png", ".svg", ".pdf")
COMPUTE, HIDDEN, BLOCKED, REST, INK = "#4c78a8", "#9ecae9", "#e45756", "#bab0ac", "#333333"


def check(path: Path) -> None:
    """Raises UserError, before anything is measured, if the picture could not be made."""
    try:
        pyplot()  # imported only when a picture is asked for
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install matplotlib, or leave --plot out") from None
    check_file("--plot", path, KINDS)


def bars(figures: Json) -> list[tuple[str, float, float, float, float]]:
    """The parts of each bar in ms: (label, compute alone, compute while gradients travel, blocked, the rest).

    Together they are the step, whose number stands behind the bar. Each figure is a median of its own. If compute and
    blocked add up to more than the step, both are scaled down to it. A case without an exchange has one part, the step.
    """
    out = []
    for label, case in figures["cases"].items():
        if "figures" not in case:
            continue
        f = case["figures"]
        if case["kind"] != "together":
            out.append((label, f["step_ms"], 0.0, 0.0, 0.0))
            continue
        hidden = min(f["compute_ms"], max(0.0, f["flight_ms"] - f["blocked_ms"]))
        parts = (f["compute_ms"] - hidden, hidden, f["blocked_ms"])
        scale = min(1.0, f["step_ms"] / sum(parts)) if sum(parts) else 1.0
        alone, hidden, blocked = (scale * part for part in parts)
        out.append((label, alone, hidden, blocked, f["step_ms"] - scale * sum(parts)))
    return out


def draw(figures: Json, path: Path) -> None:
    """Draws the picture. Raises UserError if the file cannot be written."""
    rows = bars(figures)
    labels, parts = [row[0] for row in rows], list(zip(*(row[1:] for row in rows), strict=True))
    plain = pyplot()
    figure, axes = plain.subplots(figsize=(8.6, 1.7 + 0.46 * len(rows)), layout="constrained")
    left = [0.0] * len(rows)
    names = ("compute", "compute while gradients travel", "blocked: waits for gradients", "rest: launching, updating")
    for name, colour, values in zip(names, (COMPUTE, HIDDEN, BLOCKED, REST), parts or [()] * 4, strict=True):
        axes.barh(labels, values, left=left, height=0.62, color=colour, label=name)
        left = [a + b for a, b in zip(left, values, strict=True)]
    widest = max(left, default=1.0)
    notes = [note(figures, label) for label in labels]
    for row, (end, text) in enumerate(zip(left, notes, strict=True)):
        axes.text(
            end + 0.01 * widest, row, text, va="center", color=INK, fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )  # fmt: skip
    alone = next((row[1] for row in rows if figures["cases"][row[0]]["kind"] == "alone"), None)
    if alone is not None:
        axes.axvline(alone, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=0, label="compute alone")
    axes.invert_yaxis()
    axes.set_xlim(0, (1.03 + 0.013 * max(map(len, notes), default=0)) * widest)
    axes.set_xlabel("ms a step (medians)", color=INK)
    axes.set_title(title(figures), loc="left", fontsize=10, color=INK)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written ({error.strerror}): name another file") from None
    finally:
        plain.close(figure)


def note(figures: Json, label: str) -> str:
    """The text behind a bar.

    It names the tokens of an update if they are not those of the title, as with an exchange whose rounds are timed.
    """
    case, batch = figures["cases"][label], figures["batch_tokens"]
    f = case["figures"]
    parts = [f"{f['step_ms']:.0f} ms"]
    if f["hidden"] is not None:
        parts.append(f"{max(0.0, f['hidden']):.0%} hidden")
    if case["kind"] == "together" and abs(f["tokens_per_update"] / batch - 1) > 0.01:
        parts.append(f"{f['tokens_per_update']:,.0f} tokens")
    return ", ".join(parts)


def title(figures: Json) -> str:
    asked = figures["asked"]
    link = "loopback of one machine"
    if asked["link"]:
        rate = re.sub(r"([kmg])bit", lambda found: f" {found[1].upper()}bit/s", asked["link"])
        link = f"{asked['hosts']} hosts joined at {rate}"
    threads = figures["threads"]
    each = f", {threads} thread{'s' * (threads != 1)} each" if threads else ""
    return f"One step of {figures['batch_tokens']:,} tokens: {asked['ranks']} ranks{each}, {link}"
