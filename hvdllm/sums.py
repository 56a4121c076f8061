"""Checksums that show whether a file is still what was written: of whole files, of signed texts, and of logs.

A signed text has its sum in its last line, so both are written in one piece. Each line of a log has a sum over the line
and the sum of the line before, so a changed line is noticed at once, and a lost line at the next one. Sums show damage
and not malice, because whoever rewrites a file can rewrite its sum.
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
    """The sha256 of a file. inside: the folder that it must lie in. Raises OSError or Unfit (untrusted.py)."""
    with opened(path, inside) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def beside(path: Path) -> Path:
    """The path of the file with the sum of another file, which `sha256sum --check` can read."""
    return path.with_name(f"{path.name}.sha256")


def line_for(path: Path) -> str:
    """The content of that file."""
    return f"{of_file(path)}  {path.name}\n"


def changed(path: Path, inside: Path | None = None) -> str | None:
    """Why a file does not match the sum beside it, or None if it does, or if there is no sum."""
    if not beside(path).exists():
        return None
    expected = read(beside(path), 4096, inside).decode(errors="replace").split()
    return None if expected[:1] == [of_file(path, inside)] else f"{path.name} is not what was written"


# ------------------------------------------------------------------ a text with its own sum
def signed(text: str, others: dict[str, str]) -> str:
    """A signed text: the text, then the sums of other files by their names, then the sum of all that."""
    text += "".join(f"# sha256 of {name}: {digest}\n" for name, digest in others.items())
    return f"{text}{ABOVE}{hashlib.sha256(text.encode()).hexdigest()}\n"


def verified(text: bytes) -> dict[str, str] | None:
    """The sums of other files in a signed text, or None if it is not signed. Raises Unfit if it was changed."""
    above, found, last = text.rpartition(ABOVE.encode())
    if not found:
        return None
    if last.decode(errors="replace") != hashlib.sha256(above).hexdigest() + "\n":
        raise Unfit("is not what was written (its last line has the sum of what was)")
    return dict(OF.findall(above.decode()))


# ------------------------------------------------------------------ a log
def sealed(line: str, before: str) -> tuple[str, str]:
    """Adds a sum to a line of a log.

    Args:
        line: a JSON object.
        before: the sum of the line before, "" at the beginning.

    Returns the line with its sum, and the sum.
    """
    digest = _seal(line.encode(), before.encode())
    return f'{line[:-1]}, "sum": "{digest}"}}', digest


def last(path: Path) -> str:
    """The sum of a log's last line, or "" if it has none."""
    try:
        with opened(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 64))
            found = re.search(rb'"sum": "([0-9a-f]{16})"\}\n$', file.read(64))
    except FileNotFoundError:
        return ""
    return found[1].decode() if found else ""


class Log:
    """Reads the lines of a log from the first one on, and notes which were changed or lost."""

    def __init__(self) -> None:
        self._before = b""
        self._lines = self._sealed = 0
        self._changed: list[int] = []
        self._open: int | None = None  # the number of the last line, if that is cut short

    def record(self, raw: bytes) -> Json | None:
        """The record of the next line, without its sum, or None if the line holds none."""
        self._lines += 1
        if self._open is not None:  # a kill cuts only the very last line short
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
        """What is wrong with the lines so far, as words that follow the file's name in a sentence, or None."""
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
