"""The log of a stream: the tokens of all documents that have arrived, one after the other, and an index.

    tokens-000000.bin, tokens-000001.bin, ...   SEGMENT tokens each, little-endian; an end token follows each document
    index.jsonl                                 a line for each append (Entry)
    reader-0, reader-1, ...                     logs of several readers, if there are (joined.py). This log then has an
                                                index alone, which says what of theirs comes next

Tokens are written before their line, so what the index tells of is there. What stands behind the last whole line that
agrees with its tokens was cut off by a kill; the next writer removes it and takes the source up at that line's place.
So a document is in the log once, whatever dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import threading
import time
import zlib
from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json

SEGMENT = 2**26  # tokens in a file
INDEX, LOCK = "index.jsonl", "writer.lock"
LINE = 2**20  # the most bytes of a line of the index
SYNC_S = 1.0  # seconds after which what was appended is on the disk
READERS = 1024  # the most readers of a log
CHECKED = 2**22  # tokens at the end of a log that are compared with their sums when it is opened


@dataclass(frozen=True)
class Entry:
    """What stands in a line of the index: the state of the log after an append.

    Attributes:
        tokens, documents: in the log.
        size: bytes of their text as UTF-8.
        bad: documents that were set aside so far, because they could not be read.
        lost: entries that were gone from the source before they were read.
        at: up to where the source was read, as its reader understands it.
        time: when it was appended, in seconds since 1970 by the clock of the reader's host.
        sum: crc32 of the tokens of this append, and their number is `tokens` less that of the entry before.
        reader: whose log holds the tokens; -1: this log.
        first: the first of them there.
    """

    tokens: int = 0
    documents: int = 0
    size: int = 0
    bad: int = 0
    lost: int = 0
    at: Json = field(default_factory=dict)
    time: float = 0.0
    sum: int = 0
    reader: int = -1
    first: int = 0

    def line(self) -> bytes:
        values = dataclasses.asdict(self)
        if self.reader < 0:
            del values["reader"], values["first"]
        return json.dumps(values).encode() + b"\n"

    @staticmethod
    def of(line: bytes) -> Entry:
        """Raises ValueError or TypeError if the line is none of an index."""
        found = Entry(**untrusted.parsed(line))
        whole = (found.tokens, found.documents, found.size, found.bad, found.lost, found.sum, found.first)
        if not all(type(each) is int and 0 <= each < 2**48 for each in whole) or not isinstance(found.at, dict):
            raise ValueError("its numbers are none")
        if type(found.reader) is not int or not -1 <= found.reader < READERS:
            raise ValueError("its reader is none")
        return found


class Log:
    """A log that is read while another process appends to it.

    Args:
        folder: of the log. It need not exist yet.
        dtype: of the tokens.

    Attributes:
        last: the newest entry that was read.
        news: gets each entry that is read, if it is no longer None.
    """

    def __init__(self, folder: Path, dtype: np.dtype) -> None:
        self.folder, self.dtype = folder, dtype.newbyteorder("<")
        self.last = Entry()
        self.news: deque[Entry] | None = None
        self._offset = 0  # bytes of the index that were read
        self._maps: dict[int, np.ndarray] = {}
        self._pieces = Pieces()
        self._logs: dict[int, Log] = {}  # of readers
        self._lock = threading.Lock()  # a thread loads rounds while the loop looks at what has arrived

    def refresh(self) -> list[Entry]:
        """The entries that were appended since the last call. A line that is not whole yet is read the next time."""
        with self._lock:
            return self._refresh()

    def _refresh(self) -> list[Entry]:
        found: list[Entry] = []
        try:
            with untrusted.opened(self.folder / INDEX) as file:
                file.seek(self._offset)
                for line in untrusted.lines(file, LINE):
                    if not line.endswith(b"\n"):
                        break
                    entry = Entry.of(line)
                    self.take(entry)
                    found.append(entry)
                    self._offset += len(line)
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{self.folder / INDEX} cannot be read ({error}): it is no log of this version") from None
        return found

    def take(self, entry: Entry) -> None:
        """Takes the next entry. Raises ValueError if it does not follow the one before."""
        self._pieces.add(self.last, entry)
        self.last = entry
        if self.news is not None:
            self.news.append(entry)

    def tokens(self, first: int, count: int) -> np.ndarray:
        """Tokens of the log, [count]. A view, unless they reach over the end of a file.

        Raises UserError if the files hold fewer.
        """
        if first + count > self.last.tokens:
            self.refresh()  # only rank 0 looks by itself
        parts = []
        while count > 0:
            log, place, whole = self._place(first, count)
            number, at = divmod(place, SEGMENT)
            part = log._segment(number, min(SEGMENT, at + whole))[at : at + whole]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _place(self, first: int, count: int) -> tuple[Log, int, int]:
        """The log that holds a token, its place there, and how many of `count` tokens follow there one by one."""
        with self._lock:
            found = self._pieces.of(first)
            if found is None:
                return self, first, count
            reader, place, whole = found
            log = self._logs.get(reader)
            if log is None:
                log = self._logs[reader] = Log(of_reader(self.folder, reader), self.dtype)
        return log, place, min(count, whole)

    def _segment(self, number: int, least: int) -> np.ndarray:
        """A map of a file of tokens, which has at least so many."""
        known = self._maps.get(number)
        if known is None or len(known) < least:
            path = segment(self.folder, number)
            try:
                untrusted.opened(path).close()
                size = path.stat().st_size // self.dtype.itemsize
                if size < least:
                    raise ValueError(f"it has {size:,} tokens, and its index tells of {least:,}")
                known = np.asarray(np.memmap(path, self.dtype, "r", shape=(size,)))
            except (OSError, ValueError) as error:
                raise UserError(f"{path} cannot be read ({error}): copy the log again") from None
            self._maps = {k: v for k, v in self._maps.items() if k >= number - 8} | {number: known}
        return known


class Pieces:
    """Which tokens of which reader's log each piece of a joined log consists of."""

    def __init__(self) -> None:
        self._ends, self._readers, self._firsts = array("q"), array("q"), array("q")
        self._own = False  # the log has tokens of its own

    def add(self, before: Entry, entry: Entry) -> None:
        """Takes the next entry. Raises ValueError if a log has tokens of its own and those of readers."""
        if entry.tokens == before.tokens:
            return
        if entry.tokens < before.tokens or (self._own if entry.reader >= 0 else len(self._ends) > 0):
            raise ValueError("its entries do not follow each other")
        if entry.reader < 0:
            self._own = True
        else:
            self._ends.append(entry.tokens)
            self._readers.append(entry.reader)
            self._firsts.append(entry.first)

    def of(self, token: int) -> tuple[int, int, int] | None:
        """The reader in whose log a token lies, its place there, and how many tokens follow; None if there are no
        readers, or if the token is behind the end."""
        at = bisect_right(self._ends, token)
        if at == len(self._ends):
            return None
        begin = self._ends[at - 1] if at else 0
        return self._readers[at], self._firsts[at] + token - begin, self._ends[at] - token


class Writer:
    """Appends to a log, of which only one writer is open at a time.

    Args:
        folder: of the log, which is made if it does not exist.
        dtype: of the tokens.
        wait_s: seconds that another writer may take to close it.

    Attributes:
        last: the newest entry.
        durable: the newest entry that is on the disk.

    Raises UserError if another writer has it open, or if it cannot be written.
    """

    def __init__(self, folder: Path, dtype: np.dtype, wait_s: float = 0.0) -> None:
        self.folder, self.dtype = folder, dtype.newbyteorder("<")
        end = time.monotonic() + wait_s
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / LOCK, "w")  # noqa: SIM115 - it is held until close()
            while not _locked(self._lock):
                if time.monotonic() >= end:
                    self._lock.close()
                    raise UserError(f"another run writes to {folder}: give this one a log of its own")
                time.sleep(0.05)
            self.last, size = _whole(folder, self.dtype)
            self._index = open(folder / INDEX, "ab")  # noqa: SIM115
            self._index.truncate(size)
            self._cut()
        except OSError as error:
            raise UserError(f"the log {folder} cannot be written ({error.strerror or error})") from None
        self._tokens: IO[bytes] | None = None
        self.durable, self._synced = self.last, time.monotonic()
        self.sync()

    def append(
        self, ids: Sequence[np.ndarray], documents: int, size: int, at: Json, bad: int = 0, lost: int = 0
    ) -> Entry:
        """Appends documents and their line. It is on the disk after sync(), which this calls now and then.

        Args:
            ids: the tokens of the documents, one after the other, with the end tokens.
            documents: how many they are.
            size: bytes of their text.
            at: up to where the source was read.
            bad, lost: how many more documents were set aside, and were gone.

        Raises OSError if the disk refuses. Nothing was appended then.
        """
        data = np.concatenate([np.empty(0, self.dtype), *ids]).astype(self.dtype, copy=False)
        before, first = self.last, self.last.tokens
        try:
            for start in range(0, len(data), SEGMENT):
                part = data[start : start + SEGMENT]
                while len(part):
                    number, place = divmod(first, SEGMENT)
                    room = part[: SEGMENT - place]
                    file = self._segment(number)
                    file.write(room.tobytes())
                    file.flush()
                    first, part = first + len(room), part[len(room) :]
        except OSError:
            self._undo()
            raise
        entry = Entry(
            first, before.documents + documents, before.size + size, before.bad + bad, before.lost + lost,
            at, time.time(), zlib.crc32(data.tobytes()),
        )  # fmt: skip
        self.note(entry)
        return entry

    def note(self, entry: Entry) -> None:
        """Appends a line alone. Raises OSError if the disk refuses. Nothing was appended then."""
        try:
            self._index.write(entry.line())
            self._index.flush()
        except OSError:
            self._undo()
            raise
        self.last = entry
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Waits until all that was appended is on the disk: first the tokens, then the index."""
        for file in (self._tokens, self._index):
            if file is not None:
                os.fsync(file.fileno())
        self.durable, self._synced = self.last, time.monotonic()

    def close(self) -> None:
        if self._lock.closed:
            return
        with contextlib.suppress(OSError):
            self.sync()
        for file in (self._tokens, self._index, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def _segment(self, number: int) -> IO[bytes]:
        path = segment(self.folder, number)
        if self._tokens is None or Path(self._tokens.name) != path:
            if self._tokens is not None:
                os.fsync(self._tokens.fileno())
                self._tokens.close()
            self._tokens = open(path, "ab")  # noqa: SIM115
        return self._tokens

    def _undo(self) -> None:
        """Takes back an append that failed half way."""
        with contextlib.suppress(OSError):
            if self._tokens is not None:
                self._tokens.close()
        self._tokens = None
        with contextlib.suppress(OSError):
            self._index.close()
        _, size = _whole(self.folder, self.dtype)
        self._index = open(self.folder / INDEX, "ab")  # noqa: SIM115
        self._index.truncate(size)
        self._cut()

    def _cut(self) -> None:
        """Removes the tokens behind the last entry."""
        number, place = divmod(self.last.tokens, SEGMENT)
        for path in self.folder.glob("tokens-*.bin"):
            if path > segment(self.folder, number):
                path.unlink()
        if (path := segment(self.folder, number)).exists():
            os.truncate(path, place * self.dtype.itemsize)


def _locked(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def full(folder: Path, error: OSError) -> str:
    """The sentence of a writer whose disk refuses."""
    return f"{folder} cannot be written ({error.strerror}): training goes on with what is there; make room"


def of_reader(folder: Path, number: int) -> Path:
    """The folder of a reader's own log."""
    return folder / f"reader-{number}"


def segment(folder: Path, number: int) -> Path:
    """The path of a file of tokens."""
    return folder / f"tokens-{number:06}.bin"


def _whole(folder: Path, dtype: np.dtype) -> tuple[Entry, int]:
    """The last entry of a log that is whole and agrees with its tokens, and the bytes of the index up to its end."""
    lines, size = [(Entry(), 0)], 0
    log = Log(folder, dtype)
    for line, entry in _entries(folder):
        try:
            log.take(entry)
        except ValueError:
            break
        size += len(line)
        lines.append((entry, size))
        if len(lines) > 2 and lines[-1][0].tokens - lines[1][0].tokens > CHECKED:
            lines = lines[-2:] if lines[-1][0].tokens - lines[-2][0].tokens > CHECKED else lines[1:]
    for (before, start), (entry, _) in pairwise(lines):
        try:
            held = log.tokens(before.tokens, entry.tokens - before.tokens)
        except UserError:
            return before, start
        if zlib.crc32(np.ascontiguousarray(held).tobytes()) != entry.sum:
            return before, start
    return lines[-1]


def _entries(folder: Path) -> Iterator[tuple[bytes, Entry]]:
    """The whole lines of an index and what they say, up to the first that says nothing."""
    with contextlib.suppress(FileNotFoundError, ValueError, TypeError), untrusted.opened(folder / INDEX) as file:
        for line in untrusted.lines(file, LINE):
            if not line.endswith(b"\n"):
                return
            yield line, Entry.of(line)
