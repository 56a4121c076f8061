"""Where the documents of a stream come from. Each source is read from an explicit place, which stands in the log.

A source keeps nothing and acknowledges nothing by itself: what was read and is not in the log is read again.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Protocol

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.text import corpus
from hvdllm.text.parts import Files, Stdlib, Stream

MOST = 2**20  # bytes of a document; what is longer is cut
LINE = 16 * MOST  # bytes of a line of JSON; what is longer is set aside
TOGETHER = 2**20  # bytes that are read before they are appended to the log
ENTRIES = 1024  # documents, the most that are
SETTLED_S = 1.0  # seconds for which a .txt file was not seen to change when what is new in it is taken as a document
LOOK_S = 0.2  # seconds between two looks at a folder
PAUSES_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # before a server is asked again that did not answer


@dataclass
class Taken:
    """What was read.

    Attributes:
        texts: the documents, in order.
        at: up to where the source is read with them.
        aside: what could not be read: where it stands, why, and its first bytes.
        lost: entries that were gone before they were read.
        over: nothing more will come.
    """

    texts: list[str] = field(default_factory=list)
    at: Json = field(default_factory=dict)
    aside: list[tuple[str, str, bytes]] = field(default_factory=list)
    lost: int = 0
    over: bool = False

    @property
    def nothing(self) -> bool:
        return not (self.texts or self.aside or self.lost or self.over)


class Source(Protocol):
    """A place where documents arrive."""

    def begin(self, places: Iterable[Json]) -> None:
        """Goes on behind these places, which stand in the log, in order."""

    def read(self, wait_s: float) -> Taken:
        """The next documents. Waits for so long at most; what is taken may be nothing."""

    def forget(self, at: Json) -> None:
        """What was read up to this place is trained on and saved, so it may be deleted where it came from."""


Say = Callable[[str], None]


@dataclass(frozen=True)
class Share:
    """What one of several readers takes of a source that they share. Without arguments: all of it."""

    number: int = 0
    of: int = 1

    def has(self, item: int) -> bool:
        return item % self.of == self.number


def made(settings: Stream, say: Say, share: Share = Share()) -> Source:
    """The source that the settings name, for one reader. Raises UserError if it cannot be read.

    Redis and standard input are never shared (text/parts.py, Stream.refusal).
    """
    kinds: dict[str, Callable[[Stream, Say, Share], Source]] = {
        "redis": Redis, "folder": Folder, "stdin": Lines, "replay": Replay,
    }  # fmt: skip
    return kinds[settings.source](settings, say, share)


def document(data: bytes, where: str, column: str | None, taken: Taken) -> None:
    """Adds a document to what was taken, or sets it aside. column: the field of JSON that holds it; None for text."""
    why, text = "", None
    try:
        if column is None:
            text = (data if len(data) <= MOST else whole(data[:MOST])).decode()
        else:
            row = untrusted.parsed(data)
            text = row.get(column) if isinstance(row, dict) else None
            why = "" if isinstance(text, str) else f"it has no text under {column!r}"
    except UnicodeDecodeError:
        why = "it is no UTF-8"
    except untrusted.Unfit as error:
        why = f"it {error}"
    if why or not isinstance(text, str):
        taken.aside.append((where, why, data[:1000]))
    elif text:
        taken.texts.append(cut(text))


def cut(text: str) -> str:
    """The text, or its first MOST bytes. Half a surrogate pair, which JSON can spell, becomes U+FFFD."""
    if len(text) <= MOST and text.isascii():
        return text
    data = text[:MOST].encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()
    return data[:MOST].decode(errors="ignore")


def whole(data: bytes) -> bytes:
    """UTF-8 without the character at its end of which some bytes are missing."""
    for missing in (1, 2, 3):
        if len(data) >= missing and data[-missing] >= 0xC0:  # the first byte of a character
            bytes_of_it = 2 if data[-missing] < 0xE0 else 3 if data[-missing] < 0xF0 else 4
            return data[:-missing] if missing < bytes_of_it else data
    return data


# ------------------------------------------------------------------ a text that is played
class Replay:
    """Texts that are played one after the other, at a number of documents a second. The place is how many were. If
    there are several, it also says of which text the last one was, and no append to the log holds documents of two."""

    def __init__(self, settings: Stream, say: Say, share: Share) -> None:
        self.rate, self.at, self.share = settings.rate, 0, share
        paths = settings.path if isinstance(settings.path, list) else [settings.path]
        self._texts = [Stdlib() if path is None else Files(path=path, column=settings.column) for path in paths]
        for text in self._texts:
            corpus.sources(text)  # raises UserError for a path that is none
        self._documents: Iterator[tuple[int, str]] = iter(())
        self._next: tuple[int, str] | None = None  # the first document of the next text
        self._text = 0
        self._begun = 0.0

    def begin(self, places: Iterable[Json]) -> None:
        for place in places:
            self.at = int(place.get("documents", self.at))
            self._text = int(place.get("text", self._text))
        whole = ((k, each.text) for k, text in enumerate(self._texts) for each in corpus.documents(text))
        self._documents = islice(whole, self.at, None)
        self._begun = time.monotonic() - (self.at / self.rate if self.rate else 0.0)

    def read(self, wait_s: float) -> Taken:
        taken, size = Taken(), 0
        due = ENTRIES
        if self.rate:
            time.sleep(min(wait_s, max(0.0, self._begun + (self.at + 1) / self.rate - time.monotonic())))
            due = min(ENTRIES, int((time.monotonic() - self._begun) * self.rate) - self.at)
        begin = self.at
        while self.at - begin < due and size < TOGETHER:
            following, self._next = self._next or next(self._documents, None), None
            if following is None:
                taken.over = True
                break
            number, text = following
            if number != self._text and taken.texts:
                self._next = following
                break
            self._text = number
            if self.share.has(self.at):
                taken.texts.append(cut(text))
                size += len(text)
            self.at += 1
        taken.at = {"documents": self.at} | ({"text": self._text} if len(self._texts) > 1 else {})
        return taken

    def forget(self, at: Json) -> None:
        """The text stays."""


# ------------------------------------------------------------------ a pipe
class Lines:
    """Standard input, a document a line: JSON objects with the column, or else text. What was read from a pipe and is
    not in the log when the reader dies is gone, since a pipe cannot be read again."""

    def __init__(self, settings: Stream, say: Say, share: Share) -> None:
        self.column, self.lines, self._rest = settings.column, 0, b""
        self._inside = False  # of a line that is too long, of which the beginning was taken
        os.set_blocking(sys.stdin.fileno(), False)

    def begin(self, places: Iterable[Json]) -> None:
        for place in places:
            self.lines = int(place.get("lines", self.lines))

    def read(self, wait_s: float) -> Taken:
        taken = Taken()
        select.select([sys.stdin], [], [], wait_s)
        try:
            data = os.read(sys.stdin.fileno(), TOGETHER)
            taken.over = not data
        except BlockingIOError:
            data = b""
        if self._inside:
            _, end, data = data.partition(b"\n")
            self._inside = not end
        *lines, self._rest = (self._rest + data).split(b"\n")
        if (taken.over and self._rest) or len(self._rest) > LINE:
            self._inside = not taken.over
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            self.lines += 1
            if line.strip():
                is_json = line.lstrip().startswith(b"{")
                document(line, f"line {self.lines}", self.column if is_json else None, taken)
        taken.at = {"lines": self.lines}
        return taken

    def forget(self, at: Json) -> None:
        """There is nothing to be forgotten."""


# ------------------------------------------------------------------ a folder that grows
class Folder:
    """The .jsonl and .txt files of a folder, which grow or are added. The place is how much of each file was read.

    A line of a .jsonl file is a document, once it has its end. What is new in a .txt file is one, once the file has not
    changed for SETTLED_S seconds. Of a folder that several readers share, each takes the files that their names say.
    """

    def __init__(self, settings: Stream, say: Say, share: Share) -> None:
        self.column, self.say = settings.column, say
        self.share = share
        self.folder = Path(str(settings.path)).expanduser()
        if not self.folder.is_dir():
            raise UserError(
                f"text.path={settings.path}: there is no such folder; text.source=folder reads the files in it"
            )
        self.read_of: dict[str, int] = {}
        self._seen: dict[str, tuple[int, int, float]] = {}  # of .txt files: size, time of change, and since when

    def begin(self, places: Iterable[Json]) -> None:
        for place in places:
            files = place.get("files", {})
            self.read_of.update({str(name): int(size) for name, size in files.items()})

    def read(self, wait_s: float) -> Taken:
        end = time.monotonic() + wait_s
        while (taken := self._look()).nothing and time.monotonic() < end:
            time.sleep(min(LOOK_S, max(0.0, end - time.monotonic())))
        return taken

    def _look(self) -> Taken:
        taken, left = Taken(at={"files": {}}), TOGETHER
        for path in self._files():
            name = path.relative_to(self.folder).as_posix()
            with contextlib.suppress(OSError, untrusted.Unfit), untrusted.opened(path, self.folder) as file:
                size, before = os.fstat(file.fileno()).st_size, self.read_of.get(name, 0)
                if size < before:
                    self.say(f"{path} is shorter than what was read of it: only what is added to it now is read")
                    self.read_of[name] = taken.at["files"][name] = size
                if size <= before or (path.suffix == ".txt" and not self._settled(name, file)):
                    continue
                file.seek(max(0, before - 1))
                inside = before > 0 and file.read(1) != b"\n"  # lines are taken whole, but for one that is too long
                data = file.read(max(left, 1))
                if path.suffix == ".txt":
                    data = self._piece(data, before + len(data) < size)
                    if data:
                        document(data, f"{path} from byte {before}", None, taken)
                elif inside:
                    data = data[: data.find(b"\n") + 1] or data
                else:
                    data = self._rows(path, before, data, file.read(LINE) if b"\n" not in data else b"", taken)
                if data:
                    self.read_of[name] = taken.at["files"][name] = before + len(data)
                    left -= len(data) + 8 * len(name)  # the places stand in a line of the log's index
            if left <= 0 or len(taken.texts) >= ENTRIES:
                break
        return taken

    def _settled(self, name: str, file: IO[bytes]) -> bool:
        """Whether a file was not seen to change for SETTLED_S seconds. The clocks of the hosts do not matter."""
        now, state = time.monotonic(), os.fstat(file.fileno())
        *before, since = self._seen.get(name, (-1, -1, now))
        if before != [state.st_size, state.st_mtime_ns]:
            since = now
        self._seen[name] = (state.st_size, state.st_mtime_ns, since)
        return now - since >= SETTLED_S

    def _files(self) -> list[Path]:
        found = []
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(each for each in folders if not each.startswith("."))
            found += [
                Path(folder, each) for each in sorted(files) if each.endswith((".jsonl", ".txt")) and each[0] != "."
            ]
        return [path for path in found if self.share.has(zlib.crc32(os.fsencode(path.relative_to(self.folder))))]

    @staticmethod
    def _piece(data: bytes, more: bool) -> bytes:
        """The part of a long text that is taken at a time: up to the end of a line, or of a character."""
        if more or len(data) > MOST:
            data = data[:MOST]
            data = data[: data.rfind(b"\n") + 1] or data
        return whole(data)

    def _rows(self, path: Path, before: int, data: bytes, rest: bytes, taken: Taken) -> bytes:
        """Takes whole lines. Returns what was read of the file with them."""
        data += rest
        if b"\n" not in data:
            if len(data) <= LINE:
                return b""  # its end is still to come
            taken.aside.append((f"{path} from byte {before}", "its line is too long", data[:1000]))
            return data
        data = data[: data.rfind(b"\n") + 1]
        at = before
        for line in data.split(b"\n")[:-1]:
            if line.strip():
                document(line, f"{path} from byte {at}", self.column, taken)
            at += len(line) + 1
        return data

    def forget(self, at: Json) -> None:
        """The files stay: they are the user's."""


# ------------------------------------------------------------------ Redis Streams
class Redis:
    """A stream of Redis, by XREAD from an id. The place is the last id, and how many entries were read.

    Trimming a stream is silent. What was trimmed before it was read is found by counting: entries-added less the length
    is how many are gone (Redis 7). A server that does not answer is asked again after growing pauses. An answer for
    which there is no memory (reader.py, MEMORY) is asked for again, entry by entry.
    """

    def __init__(self, settings: Stream, say: Say, share: Share) -> None:
        self.settings, self.say = settings, say
        self.id, self.count = "0-0", 0
        self._failed = 0
        self._column = settings.column.encode()
        self._ask = 16  # entries, about TOGETHER bytes as far as those before tell
        self._behind = False
        self._lib, self._client = _client(settings)

    def begin(self, places: Iterable[Json]) -> None:
        for place in places:
            self.id, self.count = str(place.get("id", self.id)), int(place.get("count", self.count))

    def read(self, wait_s: float) -> Taken:
        try:
            taken = self._read(wait_s)
        except self._lib.exceptions.AuthenticationError as error:
            raise UserError(f"{self.settings.address} refuses the password ({error}): set REDIS_PASSWORD") from None
        except MemoryError:  # in the middle of an answer: many entries were much larger than those before them
            self._client.connection_pool.disconnect()
            if self._ask == 1:
                raise UserError(
                    f"text.key={self.settings.key}: the entry after {self.id} is too large: XDEL it"
                ) from None
            self._ask = 1
            return Taken()
        except (self._lib.exceptions.ConnectionError, self._lib.exceptions.TimeoutError, OSError) as error:
            if not self._failed:
                self.say(
                    f"{_shown(self.settings.address)} does not answer ({error}): training goes on, it is asked again"
                )
            pause = PAUSES_S[min(self._failed, len(PAUSES_S) - 1)]
            self._failed += 1
            time.sleep(min(pause, wait_s))
            return Taken()
        if self._failed:
            self.say(f"{_shown(self.settings.address)} answers again")
            self._failed = 0
        return taken

    def _read(self, wait_s: float) -> Taken:
        key, lib = self.settings.key, self._lib
        taken = Taken(at={"id": self.id, "count": self.count})
        with self._client.pipeline(transaction=True) as both:  # one moment of the server, so that the counts agree
            both.exists(key)
            both.xinfo_stream(key)
            both.xread({key: self.id}, count=self._ask)
            try:
                there, info, found = both.execute(raise_on_error=False)
            except ValueError as error:  # what the package makes of a MemoryError, when it tidies up
                raise MemoryError from error
        if there == 0:
            time.sleep(min(wait_s, LOOK_S))
            return taken
        for answer in (there, info, found):
            if isinstance(answer, lib.exceptions.ResponseError):
                raise UserError(f"text.key={key} is no stream ({answer}): name one that XADD fills")
        if "entries-added" not in info:
            raise UserError(f"{_shown(self.settings.address)} is older than Redis 7: it does not count what it trims")
        added, end = int(info["entries-added"]), info["last-generated-id"]
        self._look_back(added, end.decode() if isinstance(end, bytes) else str(end))
        if (gone := added - int(info["length"])) > self.count:
            taken.lost = gone - self.count
            self.count = gone
        size = 0
        for id, fields in found[0][1] if found else ():
            where = f"entry {id.decode()}"
            if (data := fields.get(self._column)) is None:
                taken.aside.append((where, f"it has no field {self.settings.column!r}", b""))
            else:
                document(data, where, None, taken)
                size += len(data)
            self.id, self.count = id.decode(), self.count + 1
        taken.at = {"id": self.id, "count": self.count}
        if size:
            self._ask = max(1, min(ENTRIES, 2 * self._ask, self._ask * TOGETHER // size))
        elif taken.nothing:  # it waits, and takes nothing
            self._client.xread({key: self.id}, count=1, block=max(1, int(wait_s * 1000)))
        return taken

    def _look_back(self, added: int, end: str) -> None:
        """Says if the stream ends before the place up to which it was read, because its server has lost something."""
        behind = _numbers(end) < _numbers(self.id)
        if behind and not self._behind:
            self.say(
                f"text.key={self.settings.key} ends at {end} and was read up to {self.id}: its server has lost "
                f"entries, or it was made anew; what comes with an id above {self.id} is read"
            )
        self._behind, self.count = behind, min(self.count, added)

    def forget(self, at: Json) -> None:
        if not self.settings.forget or "id" not in at:
            return
        milliseconds, number = _numbers(at["id"])
        with contextlib.suppress(self._lib.exceptions.RedisError, OSError):
            self._client.xtrim(self.settings.key, minid=f"{milliseconds}-{number + 1}", approximate=False)


def _numbers(id: str) -> tuple[int, int]:
    milliseconds, _, number = str(id).partition("-")
    return int(milliseconds), int(number or 0)


def _client(settings: Stream) -> tuple[ModuleType, Any]:
    """The package redis, and a client. Raises UserError if the package is missing or the address is none."""
    try:
        redis = importlib.import_module("redis")
        once = importlib.import_module("redis.retry").Retry(importlib.import_module("redis.backoff").NoBackoff(), 0)
    except ImportError:
        raise UserError("text.source=redis needs the package redis: pip install 'hvdllm[online]'") from None
    try:
        return redis, redis.Redis.from_url(
            settings.address,
            password=os.environ.get("REDIS_PASSWORD") or None,
            socket_timeout=10,
            retry=once,
        )
    except ValueError as error:
        raise UserError(f"text.address={_shown(settings.address)} is no address of a server ({error})") from None


def _shown(address: str) -> str:
    """The address without a password."""
    before, found, after = address.rpartition("@")
    return f"{before.partition('//')[0]}//…@{after}" if found else after


def told(aside: list[tuple[str, str, bytes]]) -> str:
    """Lines for the file of documents that were set aside."""
    return "".join(
        json.dumps({"where": where, "why": why, "begins": data.decode(errors="replace")}) + "\n"
        for where, why, data in aside
    )
