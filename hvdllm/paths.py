"""Checks of paths that users give, so that an impossible one is refused with a sentence and not by a later error.

A path may be too long, name an unknown user (~who/x), hold a null byte, or consist of links in a circle.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from hvdllm.errors import UserError

LONGEST = 200  # the most bytes of a name; most file systems take 255, and names of files beside it are longer
SHOWN = 60  # the most characters of a path in a sentence


def path_of(text: str, setting: str) -> Path:
    """The path with `~` expanded. It need not exist.

    Args:
        text: the path as it was given.
        setting: the beginning of the setting or flag, for the sentence of the error.

    Raises UserError if there can be no such path.
    """
    try:
        path = Path(text).expanduser()
        if path.is_symlink():
            os.stat(path)
        else:
            os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~who, and circles in Python 3.12
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{setting}{short(text)} cannot be opened ({why}): correct the path") from None
    return path


def check_name(name: str, setting: str) -> None:
    """Raises UserError if no folder can have this name, or if it looks like an option or a hidden file."""
    if name == "" or name[0] in ".-" or "/" in name or not name.isprintable():
        raise UserError(
            f"{setting}={short(name)!r} is not the name of a folder: no slashes, no control characters, no dot or "
            "hyphen at its beginning"
        )
    try:
        length = len(os.fsencode(name))
    except UnicodeError:
        raise UserError(f"{setting}={name!r} cannot be a folder's name here: take other letters") from None
    if length > LONGEST:
        raise UserError(f"{setting}={short(name)} has {length} bytes: the name of a folder has at most {LONGEST} here")


def argument(text: str) -> Path:
    """A path among the arguments of a command, for argparse."""
    try:
        return path_of(text, "")
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def short(text: str) -> str:
    """The text, cut to SHOWN characters."""
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
