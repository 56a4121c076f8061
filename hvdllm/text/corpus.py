"""What is read: the documents of a text, in one order, each with the side (training or validation) it is on.

A file is a document, a line of a .jsonl file too. A document of more than 64 KiB is cut into pieces that
concatenate to it again, so that memory stays bounded and one long book can still be held out in part. Where it is cut
depends on the text there alone, so that copies of a part of it, wherever they stand, are cut at the same places and are
on the same side.

Text is UTF-8; a byte that is not becomes U+FFFD, the replacement character, and nothing else is changed:
line ends and byte order marks are text.
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
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from hvdllm import registry, untrusted
from hvdllm.errors import UserError
from hvdllm.paths import path_of
from hvdllm.text.parts import Files, Stdlib, Text

PIECE = 64 * 1024  # bytes; the longest document that is not cut
SHORTEST = 1024  # bytes of a piece that ends where its content says
LOOK = 64  # bytes before the end of a line, which say whether a piece ends there
ONE_IN = 256  # lines
READ = (".txt", ".md", ".py", ".jsonl")  # endings, each also followed by .gz
# Folders of the standard library that hold other people's text, or tests (half of it all, and odd encodings).
NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """One piece of text: at most 64 KiB as UTF-8, never empty (U+FFFD for bad bytes may make it longer)."""

    name: str  # the file, with ":line" for .jsonl
    text: str
    held_out: bool  # belongs to the validation text
    joins: bool  # goes on where the last document of the same side stopped: no end token between them


def documents(text: Text, copies: list[str] | None = None) -> Iterator[Document]:
    """All documents: those of the training text in order, then those of text.validation where it is given.

    Without text.validation, a piece is held out when the hash of its content falls under
    text.validation_share; where none does and there are two or more, those with the smallest hash are.
    A share of 0 holds nothing out. Equal pieces are on the same side: with text.validation those of the training text
    that it has too are left out, and `copies` gets their names.

    Raises UserError where something cannot be read, naming the file.
    """
    training, validation = sources(text)
    limit = 0 if validation else _limit(text, training)
    apart = {_hash(piece) for _, _, piece in _pieces(validation, text)}
    where: dict[bool, tuple[str, int]] = {}  # side -> the last piece on it
    for name, number, piece in _pieces(training, text):
        digest = _hash(piece)
        if digest in apart:
            if copies is not None:
                copies.append(name)
            continue
        held_out = digest < limit
        yield Document(name, piece, held_out, joins=where.get(held_out) == (name, number - 1))
        where[held_out] = (name, number)
    for name, number, piece in _pieces(validation, text):
        yield Document(name, piece, held_out=True, joins=number > 0)


def encoding_note(text: Text) -> str | None:
    """What a person should know of bytes that are no UTF-8; .jsonl is JSON, which is checked line by line.

    Raises UserError where a file begins with the byte order mark of UTF-16 or UTF-32: none of it would be its text.
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
    """Bytes of a file that are no UTF-8, and all of them."""
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
    """A file to read, unpacked where its name says so; what fails in reading names it, as UserError."""
    try:
        with untrusted.opened(path) as file:
            packed = path.suffix.lower() == ".gz"
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
    """The files of the training text and those of text.validation (empty where that is null).

    A file named by both is validation text only. Raises UserError where there is no such file.
    """
    validation = [] if text.validation is None else _resolve(text.validation, "text.validation")
    training: list[Path] = registry.built(registry.of("text", text))(text)
    apart = set(validation)
    return [path for path in training if path not in apart], validation


def files(text: Files) -> list[Path]:
    """The files that text.path names."""
    if text.path is None:
        raise UserError("text=files reads the files that text.path names: give a file, a folder or a glob")
    return _resolve(text.path, "text.path")


def stdlib(text: Stdlib) -> list[Path]:
    """The files of this machine's Python standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = list(_walk(root, (".py",), NOT_STDLIB))
    if not found:
        raise UserError(f"no .py file of the standard library is under {root}: take text=files text.path=…")
    return found


def _resolve(paths: object, setting: str) -> list[Path]:
    """The files that a path, a glob or a list of them names, in order, without repeats."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not isinstance(paths, Iterable) or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise UserError(f"{setting}={paths!r} is no path and no list of paths")
    found: dict[Path, None] = {}
    for each in paths:
        path = path_of(str(each), f"{setting}=")
        if os.path.isdir(path):
            files = list(_walk(path, READ))
        elif os.path.exists(path):
            if _ending(path) not in READ:
                raise UserError(f"{setting}: {path} is none of {', '.join(READ)} (each also .gz): rename or convert it")
            files = [path]
        elif glob.has_magic(str(path)):
            files = []
            for match in map(Path, sorted(glob.glob(str(path), recursive=True))):
                if os.path.isdir(match):
                    files += _walk(match, READ)
                elif _ending(match) in READ:
                    files.append(match)
        else:
            raise UserError(f"{setting}: there is no file or folder {path}: correct the path")
        if not files:
            raise UserError(f"{setting}: {path} holds no file of {', '.join(READ)} (each also .gz): correct the path")
        found |= dict.fromkeys(map(_regular, files))
    if not found:
        raise UserError(f"{setting} is an empty list: give a file, a folder or a glob")
    return list(found)


def _regular(path: Path) -> Path:
    """The file itself, behind all links. Raises UserError for what is none: a pipe would never end."""
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
    """Files below `root` in sorted order, links followed; hidden ones, folders in `without` and other endings are left
    out."""

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error)

    seen: set[tuple[int, int]] = set()  # a folder that several links lead to is read once, and no circle has an end
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


def _ending(path: Path) -> str:
    """ ".txt" of a.txt and of a.txt.gz."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _limit(text: Text, files: list[Path]) -> int:
    """Pieces whose hash is smaller are held out. Reads no further than the first that qualifies."""
    limit = int(text.validation_share * 2**64)
    if limit == 0:
        return 0
    smallest, count = 2**64, 0
    for _, _, piece in _pieces(files, text):
        smallest, count = min(smallest, _hash(piece)), count + 1
        if smallest < limit:
            return limit
    return smallest + 1 if count > 1 else 0


def _hash(text: str) -> int:
    """64 bits that depend on the content alone, the same on every machine; line ends and blanks at its end, in which
    copies differ, are not content."""
    content = text.replace("\r\n", "\n").rstrip() + "\n"
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8], "big")


def _pieces(files: Iterable[Path], text: Text) -> Iterator[tuple[str, int, str]]:
    """(name of the document, number of the piece in it, piece) of every file; what fails in reading names it."""
    for path in files:
        with _opened(path) as stream:
            for name, document in _documents(path, stream, text):
                for number, piece in enumerate(_cut(document)):
                    yield name, number, piece


def _documents(path: Path, stream: BinaryIO, text: Text) -> Iterator[tuple[str, BinaryIO]]:
    """The documents in one open file, by name, as streams of UTF-8."""
    if _ending(path) != ".jsonl":
        yield str(path), stream
        return
    column = getattr(text, "column", Files.column)
    for number, line in enumerate(untrusted.lines(stream), start=1):
        if line.strip():
            name = f"{path}:{number}"
            yield name, io.BytesIO(_field(name, line, column))


def _field(name: str, line: bytes, column: str) -> bytes:
    """The text of one line of a .jsonl file, as UTF-8."""
    try:
        row = untrusted.parsed(line)
    except untrusted.Unfit as error:
        raise UserError(f"{name} {error}: correct the line, or take it out") from None
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


def _cut(stream: BinaryIO) -> Iterator[str]:
    """The text whole, where it has at most 64 KiB; else in pieces of at most that, which concatenate to it."""
    rest = stream.read(PIECE + 1)
    if len(rest) <= PIECE:
        if rest:
            yield rest.decode(errors="replace")
        return
    while rest:
        while len(rest) <= PIECE and (block := stream.read(PIECE)):
            rest += block
        at = _end(rest)
        yield rest[:at].decode(errors="replace")
        rest = rest[at:]


def _end(data: bytes) -> int:
    """Where the piece ends that begins here: behind the first line whose last bytes say so (one in ONE_IN does), else
    behind the last line end of 64 KiB, or before a character."""
    at = data.find(b"\n", SHORTEST, PIECE)
    while at >= 0:
        if zlib.crc32(data[at + 1 - LOOK : at + 1]) % ONE_IN == 0:
            return at + 1
        at = data.find(b"\n", at + 1, PIECE)
    if len(data) <= PIECE:
        return len(data)
    return data.rfind(b"\n", 0, PIECE) + 1 or _border(data)


def _border(data: bytes) -> int:
    """The last place up to PIECE before which a character begins; a character has at most 3 further bytes."""
    for at in range(PIECE, PIECE - 4, -1):
        if data[at] & 0xC0 != 0x80:
            return at
    return PIECE
