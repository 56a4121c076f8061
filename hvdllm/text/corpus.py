"""The documents of a text, in one fixed order, each on one side: training or validation.

A file is a document, and so is a line of a .jsonl file. Of text=chat the text of a document is the JSON of its
conversation (text/chat.py), which is never cut. Another document of more than 64 KiB is cut into pieces that
concatenate to it again. This bounds the memory, and it lets a part of one long book be held out. Where a document is
cut depends on the text around the cut alone. Two copies of a long passage are therefore cut at the same places, and
their pieces are on the same side.

Text is read as UTF-8. A byte that is not valid UTF-8 becomes U+FFFD, the replacement character. Nothing else is
changed: line ends and byte order marks are part of the text.
"""

from __future__ import annotations

import codecs
import contextlib
import glob
import gzip
import hashlib
import io
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from hvdllm import registry, untrusted
from hvdllm.errors import UserError
from hvdllm.paths import path_of
from hvdllm.text import chat
from hvdllm.text.parts import Chat, Files, Packed, Stdlib, Stream, Text

TRAIN, HELD_OUT, COPY = range(3)  # sides of a piece; a copy of one of text.validation is on neither
PIECE = 64 * 1024  # bytes; the longest document that is not cut
SHORTEST = 1024  # bytes of a piece that ends where its content says
LOOK = 64  # bytes before the end of a line, whose hash decides whether a piece ends there
ONE_IN = 256  # lines end a piece, on average
READ = (".txt", ".md", ".py", ".jsonl")  # endings, each also followed by .gz
READ_CHAT = (".jsonl",)
# Folders of the standard library that hold other people's text, or tests (half of it all, and odd encodings).
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One piece of text: at most 64 KiB as it was read (a conversation is whole), and never empty.

    Bytes that were replaced by U+FFFD may make it longer than that.
    """

    name: str  # the file, with ":line" for .jsonl
    text: str
    held_out: bool  # belongs to the validation text
    joins: bool  # continues the last document of the same side, so no end token stands between them


@dataclass(frozen=True)
class Raw:
    """What is read at a time: a piece of a document, or a line of a .jsonl file, whose document is yet to be parsed."""

    name: str  # of the document
    number: int  # of the piece in it, or LINE
    data: bytes
    at: int = 0  # bytes of all files, as they lie on the disk, that are read by now


LINE = -1


@dataclass(frozen=True)
class Rule:
    """How lines are read, and on which side a piece is: all that another process must know of a text."""

    column: str
    conversations: bool
    limit: int  # pieces whose hash is smaller are held out
    apart: frozenset[int]  # hashes of the pieces of text.validation
    others: frozenset[int] = frozenset()  # hashes of pieces that other texts of a mixture hold out

    def pieces(self, raw: Raw) -> Iterator[tuple[str, int, str]]:
        """(name of the document, number of the piece in it, piece). Raises UserError if a line is not as it must be."""
        if raw.number != LINE:
            yield raw.name, raw.number, raw.data.decode(errors="replace")
            return
        try:
            row = untrusted.parsed(raw.data)
        except untrusted.Unfit as error:
            raise UserError(f"{raw.name} {error}: correct the line, or take it out") from None
        if self.conversations:
            yield raw.name, 0, chat.canonical(raw.name, row)
            return
        for number, piece in enumerate(_cut(io.BytesIO(_field(raw.name, row, self.column)))):
            yield raw.name, number, piece.decode()

    def side(self, digest: int) -> int:
        """The side of a piece of the training text with this hash."""
        if digest in self.apart:
            return COPY
        return HELD_OUT if digest < self.limit else COPY if digest in self.others else TRAIN

    def sampled(self, digest: int, share: float) -> bool:
        """Whether a piece of the training text belongs to a sample of it, which depends on the content alone."""
        return digest - self.limit < share * (2**64 - self.limit)


def rule(text: Text, others: frozenset[int] = frozenset()) -> Rule:
    """The rule of a text, which is to train on no piece whose hash is in `others`.

    Without text.validation a piece is held out if the hash of its content is below text.validation_share. If no piece
    is, and there are two or more, the one with the smallest hash is held out. A share of 0 holds nothing out. The text
    of text.validation is read, or else the training text up to the first piece that qualifies.
    """
    training, validation = sources(text)
    plain = Rule(getattr(text, "column", Files.column), text.conversations, 0, frozenset())
    apart = frozenset(hash_of(piece) for raw in read(validation) for _, _, piece in plain.pieces(raw))
    return replace(plain, limit=0 if validation else _limit(text, training, plain), apart=apart, others=others)


def documents(text: Text, copies: list[str] | None = None) -> Iterator[Document]:
    """All documents: first those of the training text in order, then those of text.validation, if it is given.

    Equal pieces are on the same side. With text.validation, pieces of the training text that it contains too are left
    out of the training text, and their names are added to `copies`.

    Raises UserError, which names the file, if something cannot be read.
    """
    sides, (training, validation) = rule(text), sources(text)
    where: dict[bool, tuple[str, int]] = {}  # side -> the last piece on it
    for name, number, piece in (each for raw in read(training) for each in sides.pieces(raw)):
        side = sides.side(hash_of(piece))
        if side == COPY:
            if copies is not None:
                copies.append(name)
            continue
        held_out = side == HELD_OUT
        yield Document(name, piece, held_out, joins=where.get(held_out) == (name, number - 1))
        where[held_out] = (name, number)
    for name, number, piece in (each for raw in read(validation) for each in sides.pieces(raw)):
        yield Document(name, piece, held_out=True, joins=number > 0)


def encoding_note(text: Text) -> str | None:
    """A sentence about bytes that are not valid UTF-8, or None if there are none.

    Files of .jsonl are left out: they are JSON, which is checked line by line.

    Raises UserError if a file begins with the byte order mark of UTF-16 or UTF-32, because nothing of it would be read
    as its text.
    """
    bad = total = 0
    first = None
    training, validation = sources(text)
    for path in (*training, *validation) if text.users else ():
        if _ending(path) == ".jsonl":
            continue
        found, size = _not_utf8(path)
        bad, total = bad + found, total + size
        first = first or (path if found else None)
    if first is None:
        return None
    return (
        f"{bad:,} of {total:,} bytes ({bad / total:.2%}) are no UTF-8 and were replaced, first in {first}: convert "
        "such files, for example by iconv -f latin1 -t utf8"
    )


def _not_utf8(path: Path) -> tuple[int, int]:
    """How many bytes of a file are not valid UTF-8, and how many bytes it has."""
    bad = total = 0
    with _opened(path) as stream:
        rest = b""
        while block := stream.read(2**20):
            if not total and block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
                raise UserError(f"{path} is UTF-16 or UTF-32: convert it to UTF-8, as iconv -f utf16 -t utf8 does")
            total += len(block)
            rest += block
            known = len(rest)
            try:
                rest.decode()
            except UnicodeDecodeError as error:  # a character may go on in the next block
                known = error.start if error.end == len(rest) and len(rest) - error.start < 4 else known
                bad += known - len(rest[:known].decode(errors="ignore").encode())
            rest = rest[known:]
    return bad + len(rest), total


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Opens a file, and unpacks it if its name ends in .gz. Whatever fails becomes a UserError that names the file."""
    try:
        with untrusted.opened(path) as file:
            packed = packs(path)
            if packed and not path.stat().st_size:  # gzip takes it for an empty text
                raise EOFError("it has no content at all")
            yield cast(BinaryIO, gzip.GzipFile(fileobj=file) if packed else file)
    except untrusted.Unfit as error:
        raise UserError(f"{path} {error}: correct it, or take it out") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path} is a damaged .gz file ({error}): make it again, or take it out") from None
    except OSError as error:
        raise unreadable(path, error) from None


def sources(text: Text) -> tuple[list[Path], list[Path]]:
    """The files of the training text, and those of text.validation (none if that is null).

    A file that both name is validation text only. Raises UserError if a file does not exist.
    """
    read = READ_CHAT if text.conversations else READ
    validation = [] if text.validation is None else resolve(text.validation, "text.validation", read)
    training: list[Path] = registry.built(registry.of("text", text))(text)
    apart = set(validation)
    return [path for path in training if path not in apart], validation


def files(text: Files) -> list[Path]:
    """The files that text.path names."""
    if text.path is None:
        raise UserError("text=files reads the files that text.path names: give a file, a folder or a glob")
    return resolve(text.path, "text.path")


def chats(text: Chat) -> list[Path]:
    """The files of conversations that text.path names."""
    if text.path is None:
        raise UserError("text=chat reads the files that text.path names: give a .jsonl file, a folder or a glob")
    return resolve(text.path, "text.path", READ_CHAT)


def packed(text: Packed) -> list[Path]:
    """The files that text.path names, or those of the standard library."""
    return stdlib(Stdlib()) if text.path is None else resolve(text.path, "text.path")


def stdlib(text: Stdlib) -> list[Path]:
    """The files of this machine's Python standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = list(_walk(root, (".py",), NOT_STDLIB))
    if not found:
        raise UserError(f"no .py file of the standard library is under {root}: take text=files text.path=…")
    return found


def streamed(text: Stream) -> list[Path]:
    """The files that source=replay plays, or that source=folder has now. Other sources have none."""
    if text.source in ("redis", "stdin", "log"):
        raise UserError(f"text.source={text.source} has no files: it is read while it arrives")
    return stdlib(Stdlib()) if text.path is None else resolve(text.path, "text.path")


def resolve(paths: object, setting: str, read: tuple[str, ...] = READ) -> list[Path]:
    """The files that a path, a glob or a list of these names, in order and each once."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not isinstance(paths, Iterable) or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise UserError(f"{setting}={paths!r} is no path and no list of paths")
    found: dict[Path, None] = {}
    for each in paths:
        path = path_of(str(each), f"{setting}=")
        if os.path.isdir(path):
            files = list(_walk(path, read))
        elif os.path.exists(path):
            if _ending(path) not in read:
                raise UserError(f"{setting}: {path} is none of {', '.join(read)} (each also .gz): rename or convert it")
            files = [path]
        elif glob.has_magic(str(path)):
            files = []
            for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
                if os.path.isdir(match):
                    files += _walk(match, read)
                elif _ending(match) in read:
                    files.append(match)
        else:
            raise UserError(f"{setting}: there is no file or folder {path}: correct the path")
        if not files:
            raise UserError(f"{setting}: {path} holds no file of {', '.join(read)} (each also .gz): correct the path")
        found |= dict.fromkeys(map(_regular, files))
    if not found:
        raise UserError(f"{setting} is an empty list: give a file, a folder or a glob")
    return list(found)


def _regular(path: Path) -> Path:
    """The file that a path leads to once all links are followed.

    Raises UserError if it is no regular file: reading a pipe would never end.
    """
    try:
        found = path.resolve(strict=True)
        if not found.is_file():
            raise UserError(f"{path} is no regular file (a pipe or a device): take it out, or give a file")
    except OSError as error:
        raise unreadable(path, error) from None
    except RuntimeError:
        raise UserError(f"{path} is a link that leads to itself: take it out") from None
    return found


def _walk(root: Path, endings: tuple[str, ...], without: Iterable[str] = ()) -> Iterator[Path]:
    """The files below `root` in sorted order; links are followed.

    Hidden files, folders named in `without`, and files with other endings are left out.
    """

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error)

    seen: set[tuple[int, int]] = set()  # reads a folder once that several links lead to, and ends circles of links
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        try:
            stat = os.stat(folder)
        except OSError as error:
            raise unreadable(folder, error) from None
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(each for each in folders if not each.startswith(".") and each not in without)
        for file in sorted(files):
            if not file.startswith(".") and _ending(Path(file)) in endings:
                yield Path(folder, file)


def unreadable(path: Path | str, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror or error}): make it readable, or take it out")


def packs(path: Path) -> bool:
    """Is it a .gz file?"""
    return path.suffix.lower() == ".gz"


def _ending(path: Path) -> str:
    """ ".txt" of a.txt and of a.txt.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _limit(text: Text, files: list[Path], plain: Rule) -> int:
    """The bound below which the hash of a piece means that it is held out.

    Reads no further than the first piece that qualifies.
    """
    limit = int(text.validation_share * 2**64)
    if limit == 0:
        return 0
    smallest, count = 2**64, 0
    for _, _, piece in (each for raw in read(files) for each in plain.pieces(raw)):
        smallest, count = min(smallest, hash_of(piece)), count + 1
        if smallest < limit:
            return limit
    return smallest + 1 if count > 1 else 0


def hash_of(text: str) -> int:
    """64 bits that depend on the content alone and are the same on every machine.

    The kind of line ends, and blanks at the end of the text, are ignored, because copies often differ in them.
    """
    content = text.replace("\r\n", "\n").rstrip() + "\n"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def read(files: Iterable[Path], before: int = 0) -> Iterator[Raw]:
    """All pieces and lines of these files, in order. `before` is how many bytes of others have been read.

    Raises UserError, which names the file, if it cannot be read.
    """
    for path in files:
        with _opened(path) as stream:
            lies: BinaryIO = getattr(stream, "fileobj", stream)  # of a .gz file, the file itself
            if _ending(path) != ".jsonl":
                for number, piece in enumerate(_cut(stream)):
                    yield Raw(str(path), number, piece, before + lies.tell())
            else:
                for number, line in enumerate(untrusted.lines(stream), start=1):
                    if line.strip():
                        yield Raw(f"{path}:{number}", LINE, line, before + lies.tell())
            before += lies.tell()


def _field(name: str, row: Any, column: str) -> bytes:
    """The text of one line of a .jsonl file, as UTF-8."""
    if not isinstance(row, dict) or column not in row:
        known = (
            f"it has {', '.join(str(key)[:40] for key in list(row)[:10]) or 'none'}"
            if isinstance(row, dict)
            else "it is no object"
        )
        raise UserError(f"{name} has no field {column!r} ({known}): name the one that holds the text in text.column")
    if not isinstance(row[column], str):
        raise UserError(f"{name}: the field {column!r} is no text: name the one that holds the text in text.column")
    # JSON can spell half a surrogate pair (\ud800), UTF-8 cannot.
    return cast(str, row[column]).encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode()


def _cut(stream: BinaryIO) -> Iterator[bytes]:
    """The whole text if it has at most 64 KiB; else pieces of at most that size, which concatenate to it."""
    rest = stream.read(PIECE + 1)
    if len(rest) <= PIECE:
        if rest:
            yield rest
        return
    while rest:
        while len(rest) <= PIECE and (block := stream.read(PIECE)):
            rest += block
        at = _end(rest)
        yield rest[:at]
        rest = rest[at:]


def _end(data: bytes) -> int:
    """Where the piece ends that begins at the start of `data`.

    It ends after the first line whose last LOOK bytes have a hash that one in ONE_IN lines has. If there is none within
    64 KiB, it ends after the last line end there, and if there is no line end, before the last character.
    """
    at = data.find(b"\n", SHORTEST, PIECE)
    while at >= 0:
        if zlib.crc32(data[at + 1 - LOOK : at + 1]) % ONE_IN == 0:
            return at + 1
        at = data.find(b"\n", at + 1, PIECE)
    if len(data) <= PIECE:
        return len(data)
    return data.rfind(b"\n", 0, PIECE) + 1 or _border(data)


def _border(data: bytes) -> int:
    """The last place up to PIECE at which a character begins; a character has at most 3 bytes behind its first."""
    for at in range(PIECE, PIECE - 4, -1):
        if data[at] & 0xC0 != 0x80:
            return at
    return PIECE
