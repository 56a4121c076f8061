"""The process of a tracker: `python -m hvdllm.track.process FOLDER`, started by mirror.py on rank 0.

It follows FOLDER/metrics.jsonl until its standard input ends, which is when the run closes it or is gone, reads what is
left and ends: within END_S, by SIGALRM's default if a library hangs. Signals meant for the run do not reach it, and all
that runs at higher priority comes first. Standard output carries one JSON object a line to the run: {"say": sentence},
then {"started": null} or {"started": why it was refused}.
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

EVERY_S = 0.5
MOST_STATE = 2**20  # bytes of a track.json
ID = re.compile(r"[A-Za-z0-9_-]{1,64}")  # of a run at its tracker's


def main(folder: Path, plugins: list[str]) -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)
    # A library's own processes inherit 0, 1 and 2, and would keep the run's pipes open.
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
    """Makes the tracker and hands it what it has not had. Whether the run failed, or was killed."""
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
    """Of all records of a run: what was sent, up to `tokens`; and what was not, or is of this life, since its `run`."""
    life = max((i for i, record in enumerate(records) if record.get("kind") == "run"), default=0)
    parts: tuple[list[Json], list[Json]] = [], []
    for i, record in enumerate(records):
        parts[i >= life or record.get("tokens", -1) > tokens].append(record)
    return parts


def follow(file: TextIO, run: int) -> Iterator[list[Json]]:
    """The records of a file that grows, in batches, the first at once, until the pipe `run` ends. The file stays open:
    a run's next life replaces it, and what is read here is still this one's."""
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
    record.pop("sum", None)  # of the file's lines, no number of the run's
    return record


def read_state(folder: Path) -> Json:
    """What track.json has of a form that this version writes; a stranger's folder may say anything."""
    try:
        state = untrusted.read_json(folder / "track.json", MOST_STATE, folder)
    except (OSError, ValueError):
        return {}
    return {name: kept for name, kept in state.items() if _fits(kept)} if isinstance(state, dict) else {}


def _fits(kept: Any) -> bool:
    numbers = [kept.get(key, 0) for key in ("records", "tokens")] if isinstance(kept, dict) else [None]
    return all(isinstance(each, int) for each in numbers) and bool(ID.fullmatch(str(kept.get("id", "none"))))


def brief(error: BaseException) -> str:
    """An error in at most 150 letters of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:150]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
