"""Shows a run to its user: a header, a progress line and a summary. Only rank 0 shows anything.

On a terminal the progress line is live. Elsewhere (under horovodrun, in a log file) a plain line is printed every few
seconds. What stays on the screen is also written to the run's log.txt.
"""

from __future__ import annotations

import contextlib
import math
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table

from hvdllm import screen, untrusted
from hvdllm.cli.spared import of_launcher
from hvdllm.durations import duration, left
from hvdllm.plain import Json

PLAIN_EVERY_S = 5.0


class Silent:
    """The display of all ranks but 0, which shows nothing."""

    def __enter__(self) -> Silent:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def progress(self, values: Json) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def header(self, lines: dict[str, str]) -> None:
        pass

    def finish(self, end: Json, run: str, sample: str) -> None:
        pass


SAMPLED = ' "def main("'  # what the suggested command continues


class Screen:
    """The display of rank 0, as trainer/show.py describes it.

    Args:
        alone: whether no launcher stands between this process and the terminal.
        out: a stream to write to instead of standard output.
    """

    def __init__(self, alone: bool, out: Any = None) -> None:
        # Texts, paths and samples are shown as they are, without markup or emoji. mpirun gives its ranks a terminal,
        # but puts a prefix before each of their lines, so lines cannot be live there.
        self.console = screen.console(
            out, highlight=False, markup=False, emoji=False, soft_wrap=True,
            force_terminal=None if alone or out is not None else False,
        )  # fmt: skip
        self.live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False), BarColumn(bar_width=24), TaskProgressColumn(),
            TextColumn("{task.fields[line]}", markup=False), console=self.console, transient=True,
        )  # fmt: skip
        self._task: Any = None
        self._log: Path | None = None
        self._shown = 0.0
        self._blocked = math.nan  # smoothed: a single step is too noisy to read
        self._rate: tuple[float, float] | None = None  # seconds and tokens when this process started

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def header(self, lines: dict[str, str]) -> None:
        self._log = Path(lines["run"]) / "log.txt"
        for name, text in lines.items():
            self.say(f"{name:9} {text}")

    def say(self, text: str) -> None:
        self.console.print(screen.one_line(text))
        if self._log is not None:
            # A full disk is reported when a record or a checkpoint does not fit, which ends the run.
            with contextlib.suppress(OSError, untrusted.Unfit), untrusted.appended(self._log) as file:
                file.write(f"{time.strftime('%H:%M:%S')} {screen.one_line(text)}\n")

    def progress(self, values: Json) -> None:
        now = time.monotonic()
        if math.isnan(self._blocked):
            self._blocked = values["blocked"]
        self._blocked += 0.05 * (values["blocked"] - self._blocked)
        if self._rate is None:
            self._rate = values["seconds"], values["tokens"]
        if now - self._shown < (0.1 if self.live else PLAIN_EVERY_S):
            return
        self._shown = now
        tokens, budget, unit = values["tokens"], values["budget"], values["unit"]
        passed = values["seconds"] - self._rate[0]
        rate = (tokens - self._rate[1]) / passed if passed > 0 else math.nan
        parts = [
            f"loss {values['loss']:.3f}",
            f"{rate:,.0f} {unit}/s",
            f"{100 * self._blocked:.0f}% blocked",
            left(budget - tokens, rate),
        ]
        line = " · ".join(part for part in parts if part and "nan" not in part)
        if not self.live:
            self.say(f"{tokens:>11,} {unit}  {min(100, 100 * tokens / budget):3.0f}%  {line}")
            return
        if self._task is None:
            self._progress.start()
            self._task = self._progress.add_task("", total=budget, line="")
        self._progress.update(self._task, completed=min(tokens, budget), description=f"{tokens:,} {unit}", line=line)

    def finish(self, end: Json, run: str, sample: str) -> None:
        self._progress.stop()
        if end["reason"] == "stop":
            again = f"`hvdllm train {shlex.quote(f'resume={run}')}`"
            if "prequential_whole" in end:  # where a stream arrives is not taken from a run's folder
                again = "the same command"
            self.say(f"stopped at {end['tokens']:,} {end['unit']}; {again} goes on from the last checkpoint")
            return
        unit, each, told = (end[key] for key in ("unit", "each", "told"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        rows = {
            unit: f"{end['tokens']:,} in {duration(end['seconds'])}",
            f"{unit} a second": f"{end['tokens'] / end['seconds']:,.0f}",
            "training loss": f"{end['loss']:.4f} {each}",
        }
        if end["eval_loss"] is not None:
            rows["validation loss"] = f"{end['eval_loss']:.4f} {each}" + (f", {told}" if told else "")
        if (loss := end.get("prequential_whole")) is not None:
            rows["prequential"] = f"{loss:.4f} {each}, of all text before it was learnt"
        if end["mfu"] is not None:
            rows["MFU"] = f"{100 * end['mfu']:.1f}% of the devices' peak"
        if end["data_waited_s"] > 0.01 * end["seconds"]:
            why = ", which the stream had not brought" if "prequential_whole" in end else ": a faster disk would help"
            rows["data"] = f"the loop waited {end['data_waited_s']:.1f} s for data{why}"
        rows["peak memory"] = f"{end['peak_memory_bytes'] / 2**20:,.0f} MiB on rank 0"
        rows["files"] = run
        table.add_column()
        table.add_column(overflow="fold")
        for name, text in rows.items():
            table.add_row(name, text)
        self.console.print()
        self.console.print(table)
        if sample:
            self.console.print()
            self.console.print("a sample:", style="bold")
            self.console.print(sample.rstrip())
        self.console.print()
        where = shlex.quote(run)
        commands = [f"hvdllm {name} {where}{SAMPLED * (name == 'sample')}" for name in end["next"]]
        if commands:
            self.console.print("next: " + "   ·   ".join(commands))


def make_show(rank: int, alone: bool, launcher: Sequence[int] = ()) -> Screen | Silent:
    """The display of a rank.

    Args:
        rank: which one.
        alone: whether no launcher stands between this process and the terminal.
        launcher: the pids of the ancestors up to the launcher that are on this machine, the nearest first.
    """
    return Screen(alone, of_launcher(launcher)) if rank == 0 else Silent()
