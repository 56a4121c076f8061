"""What a tracker is: somebody else who gets a run's records, Weights & Biases or TensorBoard.

A tracker lives in a process of its own (process.py), which follows the run's metrics.jsonl as one reads any log.
The run writes its records to its folder whether or not somebody follows, so that a tracker that is slow, stuck, raises
or dies can neither stop nor slow it, and the processor time of a tracker is not booked as the run's. What was not sent
while it was away is sent by the tracker of the run's next life. Rank 0 only starts the process and ends it (mirror.py).

    track.json    {tracker: {id, records, tokens}} in the run's folder, written whole: `records` were handed over in all
                  lives of the run, the furthest at `tokens`
    track.log     what a tracker's library had to say
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from hvdllm.plain import Json
from hvdllm.settings import Config

PREFIXES = {"commit": "train"}  # of a record's names, where it is not the record's kind
UPLOAD_S = 10.0  # that a tracker may take at the end for what is still to be sent
END_S = 15.0  # from the end of the run to the end of the tracker, whatever it does
Say = Callable[[str], None]


class Tracker(Protocol):
    """Made by its module's `make(config, folder, kept, before, say)`, which may raise Refused.

    kept: its part of track.json, to be changed in place. before: the records of earlier lives that were sent in these.
    say: one sentence for a person. What it raises is said once, and it gets the next record all the same.
    """

    def record(self, number: int, record: Json) -> None:
        """number: counts the records of all lives, so it only ever grows, while a record's `tokens` may go back."""

    def close(self, failed: bool) -> None:
        """failed: the run raised, or was killed."""


Make = Callable[[Config, Path, Json, list[Json], Say], Tracker]


class Refused(Exception):
    """The tracker cannot do what its settings ask for; one sentence."""


def named(record: Json) -> Iterator[tuple[str, Any]]:
    """`train/loss`, `eval/loss`, ... with their values, no `kind`, no `tokens`; of what is a number a rank, however
    many ranks there are, `train/micro_batches_by_rank/min`, `/mean` and `/max`."""
    prefix = PREFIXES.get(record["kind"], record["kind"])
    for key, value in record.items():
        if key in ("kind", "tokens") or value is None:
            continue
        if isinstance(value, list) and value and all(isinstance(each, (int, float)) for each in value):
            of = {"min": min(value), "mean": fmean(value), "max": max(value)}
            yield from ((f"{prefix}/{key}/{name}", each) for name, each in of.items())
        elif not isinstance(value, list):
            yield f"{prefix}/{key}", value
