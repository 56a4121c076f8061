"""Shows the user of a sweep which points run, how far they are, and how long the rest will take."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from hvdllm import screen, untrusted
from hvdllm.durations import duration, left
from hvdllm.launch.watched import Task

PLAIN_EVERY_S = 10.0
PREFIX = re.compile(r"^\[(?:1,)?0\]<std(?:out|err)>:", re.M)  # what horovodrun puts before rank 0's lines


class Swept(Protocol):
    """What is shown of a sweep.

    Attributes:
        tasks: the points that are known so far, by name.
        show: prints a line.
        total: how many points there will be.
    """

    tasks: dict[str, Task]
    show: Callable[[str], None]

    @property
    def total(self) -> int: ...

    def place(self, task: Task) -> str:
        """Its place among the points, such as `[3/12]`."""


class Display:
    """The display of a sweep. On a terminal it is live, with a line for each running point and one for the sweep.
    Elsewhere it prints lines.

    Args:
        sweep: what is shown.
        todo: the points that this command trains.
    """

    def __init__(self, sweep: Swept, todo: Sequence[Task]) -> None:
        self.sweep, self.todo = sweep, todo
        self.states = {task.point.name: task.state for task in todo}
        self.began = self.shown = time.monotonic()
        self.live: Any = None

    def __enter__(self) -> Display:
        if sys.stdout.isatty() and self.todo:
            from rich.live import Live

            self.live = Live(console=screen.console(), refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.stop()

    def show(self) -> None:
        """Shows what has changed. It is called often, and limits by itself how often it prints."""
        for task in self.todo:
            if (now := task.state) != self.states[task.point.name]:
                self.states[task.point.name] = now
                self.say(task)
        every = 0.25 if self.live is not None else PLAIN_EVERY_S
        if time.monotonic() - self.shown < every:
            return
        self.shown = time.monotonic()
        running = [task for task in self.todo if task.state == "running"]
        for task in running:
            task.watched.look()
        lines = [f"{self.line(task)}" for task in running]
        rest = self.left()
        if self.live is not None:
            done = sum(task.state == "done" for task in self.sweep.tasks.values())
            total = f"{done} of {self.sweep.total} points done{rest}"
            from rich.text import Text

            self.live.update(Text("\n".join([*lines, total])))
        else:
            for line in lines:
                self.sweep.show(line + rest)

    def say(self, task: Task) -> None:
        """Prints that the state of a point has changed."""
        said = {
            "running": "goes on" if task.again else "begins",
            "done": f"done: {task.tokens:,} {task.unit} in {duration(task.seconds)}"
            + (f", validation loss {task.loss:.4f}" if task.loss is not None else ""),
            "failed": f"failed: {task.why}",
            "stopped": f"stopped at {task.tokens:,} {task.unit}",
            "queued": "is left to Slurm",
        }[task.state]
        text = f"{self.sweep.place(task)} {task.point.name}  {said}"
        if self.live is not None:
            from rich.text import Text

            self.live.console.print(Text(text), soft_wrap=True)
        else:
            self.sweep.show(text)

    def line(self, task: Task) -> str:
        """The line of a running point."""
        seen = task.watched
        if not seen.tokens:
            return f"{self.sweep.place(task)} {task.point.name}  starts"
        loss = f", loss {seen.loss:.3f}" if seen.loss == seen.loss else ""
        share = 100 * min(1.0, seen.tokens / task.config.budget_tokens)
        return f"{self.sweep.place(task)} {task.point.name}  {seen.tokens:,} {task.unit} ({share:.0f}%){loss}"

    def left(self) -> str:
        """How long the rest will take, judged by the tokens that this command has trained per second, evaluations and
        starts included. It is "" if that is not known."""
        trained = missing = 0
        for task in self.todo:
            at = max(task.watched.tokens, task.tokens)
            trained += max(0, at - task.watched.began)
            missing += max(0, task.config.budget_tokens - at) if task.state in ("waiting", "running") else 0
        passed = time.monotonic() - self.began
        found = left(missing, trained / passed) if passed else ""
        return f" · {found}" if found else ""


def pass_on(log: Path, at: int, rest: bool = False) -> int:
    """Prints what is new in a log.

    Args:
        log: the file.
        at: how many bytes were printed before.
        rest: whether to print an incomplete last line, too.

    Returns how many bytes are printed now.
    """
    with contextlib.suppress(OSError, untrusted.Unfit), untrusted.opened(log) as file:
        file.seek(at)
        new = file.read()
        new = new if rest else new[: new.rfind(b"\n") + 1]
        if new:
            sys.stdout.write(PREFIX.sub("", new.decode(errors="replace")))
            sys.stdout.flush()
        return at + len(new)
    return at
