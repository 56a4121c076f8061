"""What a tracker is: a service that gets a run's records too, such as Weights & Biases or TensorBoard.

A tracker lives in a process of its own (process.py), which follows the run's metrics.jsonl as one follows any log. The
run writes its records to its folder whether or not a tracker reads them. So a tracker that is slow, hangs, raises or
dies can neither stop nor slow the run, and its processor time is not counted as the run's. Records that it did not send
are sent by the tracker of the run's next life. Rank 0 only starts the process and ends it (mirror.py).

    track.json    {tracker: {id, records, tokens}} in the run's folder: how many records were handed over in all lives
                  of the run, and the largest `tokens` of them
    track.log     what the tracker's library printed
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from hvdllm.plain import Json
from hvdllm.settings import Config

PREFIXES = {"commit": "train"}  # prefixes of names that differ from the kind of the record
UPLOAD_S = 10.0  # seconds that a tracker may take at the end to send what is left
END_S = 15.0  # seconds from the end of the run to the end of the tracker, whatever it does
Say = Callable[[str], None]


class Tracker(Protocol):
    """Made by its module's `make`, which may raise Refused.

    If `record` raises, a person is told once, and the tracker gets the next record all the same.

    Args of make(config, folder, kept, before, say):
        config: the run's settings.
        folder: the run's folder.
        kept: the tracker's part of track.json, which it may change in place.
        before: the records of earlier lives that were sent then.
        say: takes one sentence for a person.
    """

    def record(self, number: int, record: Json) -> None:
        """Takes a record. `number` counts the records of all lives, so it only grows; `tokens` may go back."""

    def close(self, failed: bool) -> None:
        """Ends the tracker. `failed` says that the run raised an error or was killed."""


Make = Callable[[Config, Path, Json, list[Json], Say], Tracker]


class Refused(Exception):
    """The tracker cannot do what its settings ask for. The message is one sentence."""


def named(record: Json) -> Iterator[tuple[str, Any]]:
    """The names and values of a record, such as `train/loss` or `eval/loss`, without `kind` and `tokens`.

    Of a list with a number for each rank there are three, `train/micro_batches_by_rank/min`, `/mean` and `/max`.
    """
    prefix = PREFIXES.get(record["kind"], record["kind"])
    for key, value in record.items():
        if key in ("kind", "tokens") or value is None:
            continue
        if isinstance(value, list) and value and all(isinstance(each, (int, float)) for each in value):
            of = {"min": min(value), "mean": fmean(value), "max": max(value)}
            yield from ((f"{prefix}/{key}/{name}", each) for name, each in of.items())
        elif not isinstance(value, list):
            yield f"{prefix}/{key}", value
