"""The protocol of what shows a run to its user."""

from __future__ import annotations

from typing import Protocol

from hvdllm.plain import Json


class Show(Protocol):
    """Shows a run to its user (cli/display.py). It is silent on all ranks but 0."""

    def progress(self, values: Json) -> None:
        """Shows how far the run is, at every commit.

        Args:
            values: `tokens` (units), `budget` and `seconds` so far; `unit`, what is counted; `loss`, that of the newest
              `commit` record; `blocked`, the share of its time in which the commit before waited for the exchange.
        """

    def say(self, text: str) -> None:
        """Writes one line that stays on the screen."""

    def header(self, lines: dict[str, str]) -> None:
        """Says what is trained, how and where, before the first round."""

    def finish(self, end: Json, run: str, sample: str) -> None:
        """Writes the summary.

        Args:
            end: the `end` record.
            run: the folder of the run.
            sample: the last sample.
        """
