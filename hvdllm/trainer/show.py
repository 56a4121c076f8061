"""What a person sees of a run."""

from __future__ import annotations

from typing import Protocol

from hvdllm.plain import Json


class Show(Protocol):
    """What a person sees (cli/display.py); silent on all ranks but 0."""

    def progress(self, values: Json) -> None:
        """Called at every commit: tokens, budget, seconds; loss of the newest `commit` record (before there is one, of
        what it will hold); blocked (a share) of the commit before."""

    def say(self, text: str) -> None:
        """One line that stays."""

    def header(self, lines: dict[str, str]) -> None:
        """What is trained, how and where; before the first round."""

    def finish(self, end: Json, run: str, sample: str) -> None:
        """The summary: the `end` record, where the files are, the last sample."""
