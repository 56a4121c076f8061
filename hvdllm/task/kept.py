"""What a task keeps in the folder of a run as task.json, and reads again with care: the folder may be a stranger's."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from hvdllm import runs, untrusted
from hvdllm.errors import UserError

NAME = "task.json"
MOST = 64 * 2**20  # bytes
T = TypeVar("T")


def digest(text: str) -> dict[str, str]:
    """The file's name and the sha256 of its text, as Task.files has them."""
    return {NAME: hashlib.sha256(text.encode()).hexdigest()}


def write(folder: Path, text: str) -> None:
    """Writes the text, which is JSON."""
    runs.write_whole(folder / NAME, text)


def read(folder: Path, made: Callable[[Any], T | None]) -> T:
    """What `made` makes of the values. It returns None, or raises KeyError or TypeError, for any that are not ours.

    Raises UserError if the file cannot be read, was changed or holds something else.
    """
    path = folder / NAME
    try:
        text = untrusted.read(path, MOST, folder)
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the run's folder again") from None
    wanted, found = runs.file_sum(folder, NAME), None
    with contextlib.suppress(untrusted.Unfit, KeyError, TypeError):
        found = made(untrusted.parsed(text))
    if found is None or hashlib.sha256(text).hexdigest() != wanted:
        raise UserError(f"{path} is not what was written: copy the run's folder again")
    return found
