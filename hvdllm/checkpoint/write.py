"""Writing a checkpoint so that what has its final name is whole.

checkpoints/<step>/
  rank-00000.safetensors  tensors by name: `model/<parameter>`, `m/<parameter>`, ...; unpadded; a range of a
                          tensor as `m/<parameter>@<first element>`, so that any world size can read it
  state.json              plain values: shared, each rank's own, the stream's position, the run's
  manifest.json           sha256 of the others, written last

All of it is written into a hidden folder beside, every file fsynced, then the folder is renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from hvdllm.errors import RunError
from hvdllm.exchange.base import State
from hvdllm.runs import sync_folder, write_whole
from hvdllm.trainer.flat import Flat
from hvdllm.world.base import World

# safetensors reports a full disk in an error class of its own.
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)


def write(folder: Path, flat: Flat, state: State, extra: dict[str, Any], world: World, keep: int) -> Path | None:
    """Writes folder/checkpoints/<step> and deletes all but the newest `keep`. Collective.

    extra: plain values of the run, rank 0's. Returns the path on rank 0. Raises RunError where the disk is full
    or refuses; the checkpoints before are untouched then.
    """
    mine = world.texts(json.dumps(state.mine), "act.save.mine")
    if not state.spans and world.rank:
        return None
    step = state.shared["step"]
    final, beside = folder / "checkpoints" / str(step), folder / "checkpoints" / f".{step}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        tensors = {}
        for kind, vector in state.sharded.items():
            for part in flat.cut(state.spans, vector):
                whole = part.start == 0 and part.values.numel() == flat.parameters[part.name].numel()
                key = f"{kind}/{part.name}" + ("" if whole else f"@{part.start}")
                values = part.values.view(flat.parameters[part.name].shape) if whole else part.values
                tensors[key] = values.cpu().contiguous()
        save_file(tensors, beside / f"rank-{world.rank:05d}.safetensors")
        state_text = {"shared": state.shared, "mine": [json.loads(text) for text in mine], **extra}
        write_whole(beside / "state.json", json.dumps(state_text))
        manifest = {file.name: _sha256_synced(file) for file in sorted(beside.iterdir())}
        write_whole(beside / "manifest.json", json.dumps({"sha256": manifest}, indent=1))
        aside = folder / "checkpoints" / f".{step}.old"
        shutil.rmtree(aside, ignore_errors=True)  # of a life that was killed between the renames
        if final.exists():  # broken, or of a life before this one: the new one takes its place by two renames
            os.replace(final, aside)
        os.replace(beside, final)
        sync_folder(final.parent)
        shutil.rmtree(aside, ignore_errors=True)
        prune(folder, keep)
    except DISK_ERRORS as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunError(
            f"cannot write the checkpoint of step {step} to {folder} ({error}): free some space and start again with "
            "the same name; the checkpoints before it are whole"
        ) from None
    return final


def write_final(folder: Path, flat: Flat, vector: Any) -> Path:
    """final/model.safetensors: the weights to keep, by parameter name; never resumed from."""
    beside, final = folder / ".final", folder / "final"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        save_file({name: flat.view(name, vector).cpu().contiguous() for name in flat.at}, beside / "model.safetensors")
        _sha256_synced(beside / "model.safetensors")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(beside, final)
        sync_folder(folder)
    except DISK_ERRORS as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise RunError(
            f"cannot write {final} ({error}): free some space; the last checkpoint holds the same weights"
        ) from None
    return final


def prune(folder: Path, keep: int) -> None:
    """Deletes all but the newest `keep` checkpoints, the manifest first: what is half deleted is not whole."""
    for old in steps(folder)[:-keep]:
        (old / "manifest.json").unlink(missing_ok=True)
        shutil.rmtree(old, ignore_errors=True)


def steps(folder: Path) -> list[Path]:
    """The checkpoints' folders, oldest first."""
    found = (folder / "checkpoints").glob("[0-9]*") if (folder / "checkpoints").is_dir() else ()
    return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))


def _sha256_synced(path: Path) -> str:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()
