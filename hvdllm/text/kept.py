"""What was found out about a text once, kept in `data_dir` as JSON. What cannot be kept is found out again."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

from hvdllm import untrusted
from hvdllm.plain import Json


def keep(path: Path, values: Json) -> None:
    """Writes the values, if the folder can be written."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(values))
        beside.replace(path)


def kept(path: Path, most: int) -> Json:
    """The values of a file of at most `most` bytes; {} if there is none, or if it holds something else."""
    with contextlib.suppress(OSError, ValueError):
        found = untrusted.read_json(path, most)
        if isinstance(found, dict):
            return found
    return {}
