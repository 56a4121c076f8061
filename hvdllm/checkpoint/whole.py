"""Which checkpoints a run has, which of them are whole, and their plain values. Nothing here needs torch.

A checkpoint is whole if all of its files are there, are regular, and have the sums that were written. The name of a
folder alone says nothing, because somebody else may have made it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from hvdllm import sums, untrusted
from hvdllm.errors import UserError
from hvdllm.plain import Json

MANIFEST = "manifest.json"
MOST_MANIFEST = 16 * 2**20  # bytes, enough for a hundred thousand ranks
MOST_STATE = 2**28  # bytes of a state.json, which has some hundred for each rank and a few for each lane
TENSORS = re.compile(r"rank-[0-9]{5}\.safetensors")


def steps(folder: Path) -> list[Path]:
    """The folders of a run's checkpoints, oldest first. Links are left out."""
    found = (folder / "checkpoints").glob("[0-9]*") if (folder / "checkpoints").is_dir() else ()
    numbered = (path for path in found if path.name.isascii() and path.name.isdecimal() and not path.is_symlink())
    return sorted(numbered, key=lambda path: int(path.name))


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; None if there is none.

    Checkpoints that are not whole are passed over, and `say` gets a sentence about each.
    """
    for path in reversed(steps(folder)):
        problem = broken(path)
        if problem is None:
            return path
        say(f"checkpoint {path} is passed over: {problem}")
    return None


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint; None if it is whole."""
    try:
        manifest = untrusted.read_json(path / MANIFEST, MOST_MANIFEST, path)
        written = manifest.get("sha256") if isinstance(manifest, dict) else None
        if not isinstance(written, dict):
            return "its manifest cannot be read (it has no sums)"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, untrusted.Unfit) as error:
        return f"its manifest cannot be read ({error})"
    try:
        if odd := next((name for name in written if name != "state.json" and not TENSORS.fullmatch(name)), None):
            return f"its manifest names {str(odd)[:80]!r}, which is no file of a checkpoint"
        if "state.json" not in written or len(written) < 2:
            return "its manifest names no state and tensors"
        if more := {file.name for file in path.iterdir()} - {*written, MANIFEST}:
            return f"{sorted(more)[0]!r} is not named in its manifest"
        for name, expected in written.items():
            if sums.of_file(path / name, path) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, untrusted.Unfit) as error:
        return f"one of its files cannot be read ({error})"
    return None


def read_state(path: Path) -> Json:
    """The state.json of a complete checkpoint. Raises UserError if it cannot be read."""
    try:
        values = untrusted.read_json(path / "state.json", MOST_STATE, path)
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"checkpoint {path} cannot be read: state.json {error}") from None
    shared = values.get("shared") if isinstance(values, dict) else None
    mine = values.get("mine") if isinstance(values, dict) else None
    if not isinstance(shared, dict) or not (isinstance(mine, list) and mine):
        raise UserError(f"checkpoint {path} cannot be read: state.json holds no state of a run")
    return dict(values)
