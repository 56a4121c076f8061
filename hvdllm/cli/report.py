"""`hvdllm report RUNS…`: says which exchange won, by how much, and whether that is more than noise."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hvdllm import screen
from hvdllm.errors import UserError
from hvdllm.paths import argument

EXAMPLES = """examples:
  hvdllm report runs/race
  hvdllm report runs/race --target-loss 4.5 --reference sharded --out race.md
  hvdllm report runs/rates --tuned-by optim.lr,exchange.outer_lr
  hvdllm report 'runs/a-*' runs/b --by exchange,world --anyway

RUNS are folders of runs or of sweeps, or patterns. Runs that differ in the seed alone are replicates of each other.
"""
KINDS = (".html", ".md", ".png", ".svg")


if TYPE_CHECKING:
    from hvdllm.report.figures import Figures
    from hvdllm.report.read import Skipped


def run(argv: list[str]) -> int:
    """Runs the command, and returns its exit code. Raises UserError."""
    parser = argparse.ArgumentParser(
        "hvdllm report", description="Compares runs: pictures, tables and a verdict.", epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="folders of runs or sweeps, or patterns")
    parser.add_argument(
        "--metric", default="loss",
        help="what evaluations are compared by: loss, or accuracy, bits_per_byte, ... as their records call it (loss)",
    )  # fmt: skip
    parser.add_argument(
        "--target", "--target-loss", type=float,
        help="metric to reach (the runs' target_loss, else the best that all reached behind their warm-up)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=argument, default=Path("report.html"),
        help="report.html (all in one file), report.md (tables), or .png, .svg (pictures: report-loss.png, ...)",
    )  # fmt: skip
    parser.add_argument("--by", default="", help="settings that are compared (exchange and wire, where they differ)")
    parser.add_argument("--tuned-by", default="", help="settings tuned for each: the best of as many trials counts")
    parser.add_argument("--reference", help="what speed-ups are measured against (allreduce, else the first)")
    parser.add_argument("--anyway", action="store_true", help="rank runs that differ in more than what is compared")
    given = parser.parse_args(argv)

    from hvdllm.report import draw
    from hvdllm.report.compare import compare
    from hvdllm.report.figures import measure
    from hvdllm.report.metric import Metric
    from hvdllm.report.read import gather

    draw.check_file("--out", given.out, KINDS)
    metric = Metric(named(given.metric))
    target = metric.target(given.target)
    check_packages()
    if given.out.suffix != ".md":
        draw.check()
    runs, skipped = gather(given.runs, metric)
    if not runs:
        said = "; ".join(f"{one.where} ({one.why})" for one in skipped[:4])
        raise UserError(f"there is no run to report on: {said}{'; …' if len(skipped) > 4 else ''}")
    by, tuned_by = (
        list(filter(None, (part.strip() for part in text.split(",")))) for text in (given.by, given.tuned_by)
    )
    try:
        comparison = compare(runs, by, tuned_by, given.anyway)
    except UserError:
        tell_skipped(skipped)
        raise
    figures = measure(comparison, skipped, target, given.reference)
    written = write(figures, given.out, "hvdllm report " + shlex.join(argv))
    show(figures)
    tell_skipped(skipped)
    print(f"written to {', '.join(map(str, written))}")
    return 0


def named(metric: str) -> str:
    """The name of a metric. Raises UserError if no record could have it."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,63}(/[A-Za-z0-9_][A-Za-z0-9_.+-]{0,63})?", metric):
        raise UserError(f"--metric {metric}: give the name of a result of evaluations, such as loss or accuracy")
    return metric


def check_packages() -> None:
    """Raises UserError if scipy is not installed."""
    try:
        import scipy.special  # noqa: F401 - for Student's t
    except ImportError:
        raise UserError("report needs scipy and matplotlib: pip install 'hvdllm[report]'") from None


def write(figures: Figures, out: Path, command: str) -> list[Path]:
    """Writes the report.

    Args:
        figures: what was measured.
        out: the file; its ending says in which form.
        command: the command line, which the page shows.

    Returns the files. Raises UserError if one cannot be written.
    """
    from hvdllm.report import draw
    from hvdllm.report.page import page
    from hvdllm.report.table import markdown

    files: dict[Path, str | bytes] = {}
    if out.suffix == ".html":
        files[out] = page(figures, draw.pictures(figures, "svg"), command)
    elif out.suffix == ".md":
        files[out] = markdown(figures)
    else:
        made = draw.pictures(figures, out.suffix[1:])
        files = {out.with_name(f"{out.stem}-{name}{out.suffix}"): data for name, (_, data) in made.items()}
        if not files:
            raise UserError("there is nothing to draw: no run has an evaluation or a commit yet")
    for path, data in files.items():
        try:
            path.write_bytes(data.encode("utf-8", "replace") if isinstance(data, str) else data)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): name another file with --out") from None
    return list(files)


def show(figures: Figures) -> None:
    """Prints the verdict and the table of results. Texts from folders are printed without markup."""
    from rich.table import Table
    from rich.text import Text

    from hvdllm.report.table import equal_line, result, streams
    from hvdllm.report.verdict import verdict

    console = screen.console(highlight=False, width=None if sys.stdout.isatty() else 180)
    console.print(Text(verdict(figures)))
    console.print(Text(equal_line(figures)))
    console.print()
    for found in (result(figures), *streams(figures)):
        grid = Table(box=None, padding=(0, 2, 0, 0), title=Text(found.title), title_justify="left", title_style="bold")
        for k, title in enumerate(found.head):
            grid.add_column(Text(title), justify="left" if k < found.left else "right")
        for row in found.rows:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)
        for note in found.notes:
            console.print(Text(f"note: {note}"))
    for note in figures.notes:
        console.print(Text(f"note: {note}"))
    console.print()


def tell_skipped(skipped: list[Skipped]) -> None:
    """Prints which folders were skipped, and why."""
    for one in skipped[:20]:
        print(f"skipped {one.where}: {one.why}")
    if len(skipped) > 20:
        print(f"skipped {len(skipped) - 20} more")
