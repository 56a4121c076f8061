"""What was found out about a text once, kept in `data_dir`. What cannot be kept is found out again."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from hvdllm import untrusted
from hvdllm.plain import Json


def keep(path: Path, data: bytes) -> None:
    """Writes a file, if the folder can be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.{os.getpid()}")
        beside.write_bytes(data)
        beside.replace(path)


def kept(path: Path, most: int) -> Json:
    """The values of a file of JSON of at most `most` bytes; {} if there is none, or if it holds something else."""
    with contextlib.suppress(OSError, ValueError):
        found = untrusted.read_json(path, most)
        if isinstance(found, dict):
            return found
    return {}
