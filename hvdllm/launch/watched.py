"""A point of a sweep, and what is known of its run while it trains."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from hvdllm import registry, untrusted
from hvdllm.launch.base import Point
from hvdllm.settings import Config


class Watched:
    """Follows the records that another process writes, for the tokens and loss of its newest commit."""

    def __init__(self, folder: Path) -> None:
        self.path, self.at = folder / "metrics.jsonl", 0
        self.tokens, self.loss = 0, float("nan")
        self.began = 0  # tokens when this command started or resumed the run

    def look(self) -> None:
        """Reads what is new."""
        try:
            with untrusted.opened(self.path, self.path.parent) as file:
                if os.fstat(file.fileno()).st_size < self.at:  # a resumed run has cut its records
                    self.at = 0
                file.seek(self.at)
                new = file.read(untrusted.MOST_LINE)  # the rest is read at the next look
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
    """A point, and what became of it.

    Attributes:
        point: its name and words.
        config: its settings.
        differs: the words that vary in the sweep.
        state: waiting, running, done, stopped, failed, or queued for a Slurm job that goes on without this process.
        tokens: committed so far.
        seconds: of training.
        loss: the last validation loss, if there is one.
        why: it failed, in a sentence.
        again: whether an earlier command has begun the run.
        watched: follows the run.
    """

    point: Point
    config: Config
    differs: tuple[str, ...]
    state: str = "waiting"
    tokens: int = 0
    seconds: float = 0.0
    loss: float | None = None
    why: str = ""
    again: bool = False
    watched: Watched = field(init=False)

    def __post_init__(self) -> None:
        self.watched = Watched(self.point.folder)

    @property
    def unit(self) -> str:
        """What its run counts."""
        return str(registry.of("task", self.config.task).facts.unit)
