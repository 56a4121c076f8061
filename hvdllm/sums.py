"""Sums by which a file shows that it is what was written: of whole files, of a text that carries its own, of a log.

A text carries its sum in its last line, so that both are written in one piece. A log's lines carry one each, over the
line and the sum of the line before: a changed digit shows in its line, a lost line in the next one. Sums show damage,
not malice: who rewrites a file can rewrite its sum.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from hvdllm.plain import Json
from hvdllm.untrusted import Unfit, opened, parsed, read

ABOVE = "# sha256 of the lines above: "
OF = re.compile(r"# sha256 of ([\w.]+): ([0-9a-f]{64})")
SUM = re.compile(rb'(\{.*), "sum": "([0-9a-f]{16})"\}', re.S)


# ------------------------------------------------------------------ a file beside another
def of_file(path: Path, inside: Path | None = None) -> str:
    """sha256 of a file. Raises OSError or Unfit."""
    with opened(path, inside) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: Path) -> Path:
    """Where the sum of a file stands, as `sha256sum --check` reads it."""
    return path.with_name(f"{path.name}.sha256")


def line_for(path: Path) -> str:
    return f"{of_file(path)}  {path.name}\n"


def changed(path: Path, inside: Path | None = None) -> str | None:
    """Why a file is not the one whose sum stands beside it; None: it is, or there is no sum."""
    if not beside(path).exists():
        return None
    expected = read(beside(path), 4096, inside).decode(errors="replace").split()
    return None if expected[:1] == [of_file(path, inside)] else f"{path.name} is not what was written"


# ------------------------------------------------------------------ a text with its own sum
def signed(text: str, others: dict[str, str]) -> str:
    """The text, the sums of other files by their names, and last that of all of this."""
    text += "".join(f"# sha256 of {name}: {digest}\n" for name, digest in others.items())
    return f"{text}{ABOVE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def verified(text: bytes) -> dict[str, str] | None:
    """The sums of other files that a signed text has; None where it is not signed. Raises Unfit where it has been
    changed."""
    above, found, last = text.rpartition(ABOVE.encode())
    if not found:
        return None
    if last.decode(errors="replace") != hashlib.sha256(above).hexdigest() + "\n":
        raise Unfit("is not what was written (its last line has the sum of what was)")
    return dict(OF.findall(above.decode()))


# ------------------------------------------------------------------ a log
def sealed(line: str, before: str) -> tuple[str, str]:
    """A JSON object in one line with its sum, and that sum. before: of the line above, "" at the beginning."""
    digest = _seal(line.encode(), before.encode())
    return f'{line[:-1]}, "sum": "{digest}"}}', digest


def last(path: Path) -> str:
    """The sum of a log's last line; "" where it has none."""
    try:
        with opened(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
            found = re.search(rb'"sum": "([0-9a-f]{16})"\}\n$', file.read(64))
    except FileNotFoundError:
        return ""
    return found[1].decode() if found else ""


class Log:
    """Reads a log from its first line on."""

    def __init__(self) -> None:
        self._before = b""
        self._lines = self._sealed = 0
        self._changed: list[int] = []
        self._open: int | None = None  # the last line, where it is cut short

    def record(self, raw: bytes) -> Json | None:
        """The record of the next line, without its sum; None where it is none."""
        self._lines += 1
        if self._open is not None:  # only the very last one is cut short by a kill
            self._changed.append(self._open)
        self._open = None if raw.endswith(b"\n") else self._lines
        line = raw.strip()
        if found := SUM.fullmatch(line):
            self._sealed += 1
            if _seal(found[1] + b"}", self._before).encode() != found[2]:
                self._changed.append(self._lines)
            self._before = found[2]
        elif line and self._open is None:
            self._changed.append(self._lines)
        try:
            value = parsed(line) if line else None
        except Unfit:
            return None
        if isinstance(value, dict) and value.get("kind") is not None:
            value.pop("sum", None)
            return value
        return None

    def problem(self) -> str | None:
        """What is wrong with the lines so far, as words to go on after the file's name."""
        if not self._lines:
            return None
        if not self._sealed:
            return "has no sums, it is of an older version: a changed or lost line would go unseen"
        if not self._changed:
            return None
        first, more = self._changed[0], len(self._changed) - 1
        return f"was changed in line {first}, or one above it is lost" + f", and in {more} more" * (more > 0)


def _seal(line: bytes, before: bytes) -> str:
    return hashlib.sha256(before + line).hexdigest()[:16]
