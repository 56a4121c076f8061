"""Joins the logs of several readers to one, on rank 0 (text.readers).

Each reader appends to a log of its own, RUN/log/reader-K. The log that is trained on, RUN/log, has an index alone: each
of its lines says which tokens of which reader come next. Rank 0 writes them in the order in which it finds what the
readers have appended, and they never change. So a place in the log means the same tokens in every life of the run, for
every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import numpy as np

from hvdllm.errors import UserError
from hvdllm.online.log import Entry, Log, Writer, of_reader


class Joiner:
    """Appends to the index of a log what its readers have appended to theirs.

    Args:
        folder: of the log.
        dtype: of the tokens.
        readers: how many there are.
        wait_s: seconds that another writer may take to end.
        say: gets a sentence if the index cannot be written, and another once it can.

    Raises UserError if another run writes to the log, or if it has more readers.
    """

    def __init__(self, folder: Path, dtype: np.dtype, readers: int, wait_s: float, say: Callable[[str], None]) -> None:
        self.say = say
        self._writer = Writer(folder, dtype, wait_s)
        self._logs = [Log(of_reader(folder, k), dtype) for k in range(readers)]
        self._joined = [Entry()] * readers  # how much of each reader's log is in this one
        self._waiting: list[tuple[int, Entry]] = []  # what could not be appended yet
        self._full = False
        before = Entry()
        for entry in Log(folder, dtype).refresh():
            if not 0 <= entry.reader < readers:
                self._writer.close()
                raise UserError(f"{folder} was read by another number of readers than text.readers={readers}")
            self._joined[entry.reader] = counted(self._joined[entry.reader], entry, before)
            before = entry

    def join(self) -> None:
        """Appends what is new. If the disk refuses, the same is tried again the next time."""
        for k, log in enumerate(self._logs):
            self._waiting += [(k, entry) for entry in log.refresh() if entry.tokens >= self._joined[k].tokens]
        over = all(log.last.at.get("over") for log in self._logs)
        try:
            while self._waiting:
                k, entry = self._waiting[0]
                self._append(k, entry, over and len(self._waiting) == 1)
                self._waiting.pop(0)
        except OSError as error:
            if not self._full:
                folder = self._writer.folder
                self.say(
                    f"{folder} cannot be written ({error.strerror}): training goes on with what is there; make room"
                )
            self._full = True
            return
        if self._full:
            self.say(f"{self._writer.folder} can be written again")
        self._full = False

    def _append(self, k: int, entry: Entry, over: bool) -> None:
        """Appends what this entry of reader k adds to what is joined. Raises OSError if the disk refuses."""
        joined = self._joined[k]
        tokens = self._logs[k].tokens(joined.tokens, entry.tokens - joined.tokens)
        at = {key: value for key, value in entry.at.items() if key != "over"} | ({"over": True} if over else {})
        total = crc32(np.ascontiguousarray(tokens).tobytes())
        self._writer.note(
            replace(
                counted(self._writer.last, entry, joined),
                at=at, time=entry.time, sum=total, reader=k, first=joined.tokens,
            )
        )  # fmt: skip
        self._joined[k] = entry

    def close(self) -> None:
        self._writer.close()


def counted(total: Entry, entry: Entry, before: Entry) -> Entry:
    """What `total` counts, and what `entry` counts more than `before`."""
    return Entry(
        tokens=total.tokens + entry.tokens - before.tokens,
        documents=total.documents + entry.documents - before.documents,
        size=total.size + entry.size - before.size,
        bad=total.bad + entry.bad - before.bad,
        lost=total.lost + entry.lost - before.lost,
    )
