"""A point of a sweep, and what is known of its run while it goes on."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from hvdllm import untrusted
from hvdllm.launch.base import Point
from hvdllm.settings import Config


class Watched:
    """The newest commit of a run that another process writes; reads only what is new."""

    def __init__(self, folder: Path) -> None:
        self.path, self.at = folder / "metrics.jsonl", 0
        self.tokens, self.loss = 0, float("nan")
        self.began = 0  # tokens when this command took it up

    def look(self) -> None:
        try:
            with untrusted.opened(self.path, self.path.parent) as file:
                if os.fstat(file.fileno()).st_size < self.at:  # cut, by a run that goes on
                    self.at = 0
                file.seek(self.at)
                new = file.read(untrusted.MOST_LINE)  # the rest at the next look
        except (OSError, untrusted.Unfit):
            new = b""
        whole = new[: new.rfind(b"\n") + 1]
        self.at += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, TypeError, AttributeError):
                record = untrusted.parsed(line)
                if record.get("kind") == "commit":
                    self.tokens, self.loss = int(record["tokens"]), float(record["loss"])


@dataclass
class Task:
    """A point, how it is started, and what became of it.

    state: waiting, running, done, stopped, queued (a Slurm job that goes on without us) or failed. seconds: training
    time. loss: the last validation loss. why: it failed.
    """

    point: Point
    config: Config
    differs: tuple[str, ...]
    state: str = "waiting"
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    why: str = ""
    again: bool = False  # there was something of it before
    watched: Watched = field(init=False)

    def __post_init__(self) -> None:
        self.watched = Watched(self.point.folder)
