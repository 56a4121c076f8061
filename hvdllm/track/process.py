"""The process of a tracker: `python -m hvdllm.track.process FOLDER`, started by mirror.py on rank 0.

It follows FOLDER/metrics.jsonl until its standard input ends, which means that the run has closed it or is gone. Then
it reads what is left and ends. If a library hangs, SIGALRM ends it within END_S. Signals that are meant for the run do
not reach it, and it runs at a low priority. Its standard output carries one JSON object in each line to the run:
{"say": sentence}, and once {"started": null} or {"started": why it was refused}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from hvdllm import registry, runs, untrusted
from hvdllm.plain import Json
from hvdllm.track.base import END_S, Make, Refused

EVERY_S = 0.5  # seconds between two looks at the file
MOST_STATE = 2**20  # bytes of a track.json
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # the id that a tracker gives to a run


def main(folder: Path, plugins: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    # Processes that a library starts inherit 0, 1 and 2, and would keep the pipes to the run open.
    run, words = os.dup(0), os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def tell(what: str, value: Any) -> None:
        with contextlib.suppress(OSError):  # the run is gone
            words.write(json.dumps({what: value}) + "\n")

    registry.load(plugins)
    config = runs.read_config(folder)
    part = registry.of("track", config.track)
    make: Make = registry.built(part)
    with io.TextIOWrapper(untrusted.opened(folder / "metrics.jsonl", folder), "utf-8", "replace") as file:
        try:
            failed = serve(folder, part.name, config, make, follow(file, run), tell)
        except Refused as refused:
            tell("started", str(refused))
            return 2
    return int(failed)


def serve(folder: Path, name: str, config: Any, make: Make, batches: Iterator[list[Json]], tell: Any) -> bool:
    """Makes the tracker and hands it the records that it has not had.

    Returns whether the run failed or was killed.
    """
    state = read_state(folder)
    kept = state.setdefault(name, {})
    kept.setdefault("records", 0)
    kept.setdefault("tokens", -1)
    before, fresh = split(next(batches), kept["tokens"])
    tracker = make(config, folder, kept, before, lambda text: tell("say", text))
    tell("started", None)
    failed, said = True, False
    for batch in chain(fresh, batches):
        number = kept["records"]
        kept["records"] += len(batch)
        kept["tokens"] = max([kept["tokens"], *(r.get("tokens", -1) for r in batch)])
        runs.write_whole(folder / "track.json", json.dumps(state))
        for i, record in enumerate(batch):
            if record.get("kind") == "end":
                failed = record.get("reason") == "failed"
            try:
                tracker.record(number + i, record)
            except Exception as error:
                traceback.print_exc()
                if not said:
                    tell("say", f"{name} did not take a record ({brief(error)}); {folder}/track.log has the rest")
                said = True
    tracker.close(failed)
    return failed


def chain(first: list[Json], rest: Iterator[list[Json]]) -> Iterator[list[Json]]:
    yield first
    yield from rest


def split(records: list[Json], tokens: int) -> tuple[list[Json], list[Json]]:
    """Splits the records of a run into those that were sent and those that were not.

    Sent are the records of earlier lives up to `tokens`. A life begins with its `run` record.
    """
    life = max((i for i, record in enumerate(records) if record.get("kind") == "run"), default=0)
    parts: tuple[list[Json], list[Json]] = [], []
    for i, record in enumerate(records):
        parts[i >= life or record.get("tokens", -1) > tokens].append(record)
    return parts


def follow(file: TextIO, run: int) -> Iterator[list[Json]]:
    """The records of a growing file, in batches, until the pipe `run` ends. The first batch comes at once.

    The file stays open. The next life of the run replaces it, but what is read here is still the file of this life.
    """
    rest, ended, first = "", False, True
    while not ended:
        ended = bool(select.select([run], [], [], 0.0 if first else EVERY_S)[0])
        if ended:
            signal.alarm(round(END_S))
        *lines, rest = (rest + file.read()).split("\n")
        records = [record for record in map(parsed, lines) if "kind" in record]
        if records or first:
            yield records
        first = False


def parsed(line: str) -> Json:
    try:
        record = untrusted.parsed(line)
    except ValueError:
        return {}
    if not isinstance(record, dict):
        return {}
    record.pop("sum", None)  # the checksum of the line
    return record


def read_state(folder: Path) -> Json:
    """The parts of track.json that have the form which this version writes. A stranger's folder may hold anything."""
    try:
        state = untrusted.read_json(folder / "track.json", MOST_STATE, folder)
    except (OSError, ValueError):
        return {}
    return {name: kept for name, kept in state.items() if _fits(kept)} if isinstance(state, dict) else {}


def _fits(kept: Any) -> bool:
    numbers = [kept.get(key, 0) for key in ("records", "tokens")] if isinstance(kept, dict) else [None]
    return all(isinstance(each, int) for each in numbers) and bool(ID.fullmatch(str(kept.get("id", "none"))))


def brief(error: BaseException) -> str:
    """An error as one line of at most 150 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:150]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
