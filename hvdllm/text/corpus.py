"""What is read: the documents of a text, in one order, each with the side (training or validation) it is on.

A file is a document, a line of a .jsonl file too. A document of more than 64 KiB is cut into pieces that
concatenate to it again, so that memory stays bounded and one long book can still be held out in part.

Text is UTF-8; a byte that is not becomes U+FFFD, the replacement character, and nothing else is changed:
line ends and byte order marks are text.
"""

from __future__ import annotations

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

from hvdllm import untrusted
from hvdllm.config.schema import Files, Text
from hvdllm.errors import UserError

PIECE = 64 * 1024  # bytes; the longest document that is not cut
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


def documents(text: Text) -> Iterator[Document]:
    """All documents: those of the training text in order, then those of text.validation where it is given.

    Without text.validation, a piece is held out when the hash of its content falls under
    text.validation_share; where none does and there are two or more, those with the smallest hash are.
    A share of 0 holds nothing out. Equal pieces are on the same side.

    Raises UserError where something cannot be read, naming the file.
    """
    training, validation = sources(text)
    limit = 0 if validation else _limit(text, training)
    where: dict[bool, tuple[str, int]] = {}  # side -> the last piece on it
    for name, number, piece in _pieces(training, text):
        held_out = _hash(piece) < limit
        yield Document(name, piece, held_out, joins=where.get(held_out) == (name, number - 1))
        where[held_out] = (name, number)
    for name, number, piece in _pieces(validation, text):
        yield Document(name, piece, held_out=True, joins=number > 0)


def sources(text: Text) -> tuple[list[Path], list[Path]]:
    """The files of the training text and those of text.validation (empty where that is null).

    A file named by both is validation text only. Raises UserError where there is no such file.
    """
    validation = [] if text.validation is None else _resolve(text.validation, "text.validation")
    if isinstance(text, Files):
        if text.path is None:
            raise UserError("text=files reads the files that text.path names: give a file, a folder or a glob")
        training = _resolve(text.path, "text.path")
    else:
        root = Path(sysconfig.get_paths()["stdlib"])
        training = list(_walk(root, (".py",), NOT_STDLIB))
        if not training:
            raise UserError(f"no .py file of the standard library is under {root}: take text=files text.path=…")
    apart = set(validation)
    return [path for path in training if path not in apart], validation


def _resolve(paths: object, setting: str) -> list[Path]:
    """The files that a path, a glob or a list of them names, in order, without repeats."""
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if not isinstance(paths, Iterable) or not all(isinstance(path, str | os.PathLike) for path in paths):
        raise UserError(f"{setting}={paths!r} is no path and no list of paths")
    found: dict[Path, None] = {}
    for each in paths:
        path = Path(each).expanduser()
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
        found |= dict.fromkeys(file.resolve() for file in files)
    if not found:
        raise UserError(f"{setting} is an empty list: give a file, a folder or a glob")
    return list(found)


def _walk(root: Path, endings: tuple[str, ...], without: Iterable[str] = ()) -> Iterator[Path]:
    """Files below `root` in sorted order; hidden ones, folders in `without` and other endings are skipped."""

    def refuse(error: OSError) -> None:
        raise unreadable(error.filename, error)

    for folder, folders, files in os.walk(root, onerror=refuse):
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
    """64 bits that depend on the content alone, the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _pieces(files: Iterable[Path], text: Text) -> Iterator[tuple[str, int, str]]:
    """(name of the document, number of the piece in it, piece) of every file; what fails in reading names it."""
    for path in files:
        try:
            with untrusted.opened(path) as file:
                stream = cast(BinaryIO, gzip.GzipFile(fileobj=file) if path.suffix.lower() == ".gz" else file)
                for name, document in _documents(path, stream, text):
                    for number, piece in enumerate(_cut(document)):
                        yield name, number, piece
        except untrusted.Unfit as error:
            raise UserError(f"{path} {error}: correct it, or take it out") from None
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is a damaged .gz file ({error}): make it again, or take it out") from None
        except OSError as error:
            raise unreadable(path, error) from None


def _documents(path: Path, stream: BinaryIO, text: Text) -> Iterator[tuple[str, BinaryIO]]:
    """The documents in one open file, by name, as streams of UTF-8."""
    if _ending(path) != ".jsonl":
        yield str(path), stream
        return
    column = text.column if isinstance(text, Files) else Files.column
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
    """Pieces of at most 64 KiB, cut after the last line end in them, or before a character, that concatenate
    to the whole text."""
    rest = b""
    while block := stream.read(PIECE):
        rest += block
        while len(rest) > PIECE:
            at = rest.rfind(b"\n", 0, PIECE) + 1 or _border(rest)
            yield rest[:at].decode(errors="replace")
            rest = rest[at:]
    if rest:
        yield rest.decode(errors="replace")


def _border(data: bytes) -> int:
    """The last place up to PIECE before which a character begins; a character has at most 3 further bytes."""
    for at in range(PIECE, PIECE - 4, -1):
        if data[at] & 0xC0 != 0x80:
            return at
    return PIECE
