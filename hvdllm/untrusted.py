"""Opens files that somebody else may have written, such as those of a run's folder, of a text or of a cache.

- Only regular files are opened. A pipe would have to be waited for, and a device has no end.
- A file must lie inside its folder after links are followed.
- No more than `most` bytes are read.
- JSON and YAML are nested at most DEPTH deep, and YAML has no aliases, which could multiply its size.

Nothing here imports or starts anything. What the files of a folder may decide is written down in settings.py
(`setting(ours=...)`) and, for users, in hvdllm/checkpoint/README.md.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, TextIO

DEPTH = 32  # how deep JSON and YAML may be nested; what hvdllm writes needs 6
MOST_LINE = 16 * 2**20  # the most bytes of a line of JSON


class Unfit(ValueError):
    """A file must not be read. The message follows the file's name in a sentence: `is no regular file`."""


def opened(path: Path, inside: Path | None = None) -> BufferedReader:
    """Opens a regular file for reading.

    Args:
        path: of the file.
        inside: the folder in which it must lie after links are followed.

    Raises OSError if there is no such file, and Unfit if it is not a regular file or lies elsewhere.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    if inside is not None:
        path, flags = within(path, inside), flags | os.O_NOFOLLOW
    return open(_regular(path, flags), "rb")


def appended(path: Path) -> TextIO:
    """Opens a file for appending, and makes it if there is none. A link is not followed, since it may lead anywhere.

    Raises OSError, or Unfit if it is a link or not a regular file.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    if path.is_symlink():
        raise Unfit("is a link, which is not written through")
    return open(_regular(path, flags), "a", encoding="utf-8")


def within(path: Path, folder: Path) -> Path:
    """The path with its links followed. Raises Unfit if it leads out of the folder, and OSError if it leads nowhere."""
    with _names():
        real, root = os.path.realpath(path, strict=True), os.path.realpath(folder)
    if os.path.commonpath([real, root]) != root:
        raise Unfit("leads out of its folder by a link")
    return Path(real)


def read(path: Path, most: int, inside: Path | None = None) -> bytes:
    """The content of a file. Raises OSError or Unfit. A file of more than `most` bytes is not read."""
    with opened(path, inside) as file:
        if os.fstat(file.fileno()).st_size <= most and len(data := file.read(most + 1)) <= most:
            return data
    raise Unfit(f"is larger than the {_size(most)} that it may have")


def lines(file: IO[bytes], most: int = MOST_LINE) -> Iterator[bytes]:
    """Yields the lines of a file, with their ends. Raises Unfit at a line of more than `most` bytes."""
    number = 0
    while line := file.readline(most + 1):
        number += 1
        if len(line) > most:
            raise Unfit(f"has more than {_size(most)} in line {number}")
        yield line


def parsed(text: bytes | str) -> Any:
    """The value of a JSON text. Raises Unfit if it is not JSON, or nested too deeply."""
    try:
        value = json.loads(text)
    except RecursionError:
        raise Unfit("is nested too deeply") from None
    except ValueError as error:
        raise Unfit(f"is not JSON ({_brief(error)})") from None
    data = text.encode() if isinstance(text, str) else text
    if data.count(b"[") + data.count(b"{") > DEPTH:
        _check_depth(value, "JSON")
    return value


def read_json(path: Path, most: int, inside: Path | None = None) -> Any:
    """The value of a JSON file of at most `most` bytes. Raises OSError or Unfit."""
    return parsed(read(path, most, inside))


def parsed_yaml(text: bytes) -> Any:
    """The value of a YAML text. Raises Unfit if it is not YAML, is nested too deeply, or has aliases or other tags."""
    import yaml

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # it has no types
        def compose_node(self, parent: object, index: object) -> object:
            if self.check_event(yaml.AliasEvent):
                raise Unfit("has a YAML alias, which no configuration needs")
            return super().compose_node(parent, index)

    try:
        value = yaml.load(text, Loader)
    except Unfit:
        raise
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError) as error:
        raise Unfit(f"is not YAML ({_brief(error)})") from None
    _check_depth(value, "YAML")
    return value


# ------------------------------------------------------------------ inside
def _regular(path: Path, flags: int) -> int:
    """Opens a regular file, and returns its descriptor.

    It is checked before it is opened, because some devices act when they are opened, and again afterwards, because it
    may have been replaced.
    """
    with _names():
        if (flags & os.O_CREAT) == 0 or path.exists():
            _check(path.stat().st_mode)
        handle = os.open(path, flags, 0o666)
    try:
        _check(os.fstat(handle).st_mode)
    except Unfit:
        os.close(handle)
        raise
    return handle


@contextmanager
def _names() -> Iterator[None]:
    """A context in which ValueError, which Python raises for a path with a null byte or half a surrogate pair, becomes
    Unfit."""
    try:
        yield
    except Unfit:
        raise
    except ValueError:
        raise Unfit("has a name that no file can have") from None


def _check(mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise Unfit("is no regular file")


def _check_depth(value: object, what: str) -> None:
    level, depth = [value], 0
    while level:
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
        depth += 1
        if depth > DEPTH:
            raise Unfit(f"is {what} nested more than {DEPTH} deep")


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count >> 10} KiB" if count >= 2**10 else f"{count} bytes"
