"""Finding the newest whole checkpoint and reading it, whatever world size wrote it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hvdllm.checkpoint.write import steps
from hvdllm.errors import UserError
from hvdllm.trainer.flat import Flat, Part
from hvdllm.world.base import World


def newest(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint of a run whose files are what its manifest says; others are named and passed over."""
    for path in reversed(steps(folder)):
        problem = broken(path)
        if problem is None:
            return path
        say(f"checkpoint {path} is passed over: {problem}")
    return None


def broken(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())["sha256"]
        for name, expected in manifest.items():
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected:
                    return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"its manifest cannot be read ({error})"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a whole checkpoint."""
    values: dict[str, Any] = json.loads((path / "state.json").read_text())
    return values


def read_vector(path: Path, kind: str, flat: Flat, vector: torch.Tensor) -> None:
    """Fills a vector over the map with `kind`: model, m, v; "" in final/. Raises UserError where a tensor misfits."""
    parts, covered = [], dict.fromkeys(flat.at, 0)
    try:
        for file in sorted(path.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 - not a dict
                    prefix, _, rest = key.rpartition("/")
                    name, _, start = rest.partition("@")
                    if prefix == kind and name in covered:
                        values = tensors.get_tensor(key)
                        covered[name] += values.numel()
                        parts.append(Part(name, int(start or 0), values))
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
    for name, count in covered.items():
        if count != flat.parameters[name].numel():
            raise UserError(f"checkpoint {path} does not fit this model: `{kind}/{name}` has {count} elements there")
    flat.paste(parts, vector)


def share_vector(path: Path | None, kind: str, flat: Flat, world: World) -> torch.Tensor:
    """Rank 0 reads `kind` and broadcasts it, bucket by bucket; every rank gets the whole vector. Collective."""
    vector = torch.zeros_like(flat.x)
    if world.rank == 0:
        assert path is not None
        read_vector(path, kind, flat, vector)
    for bucket in flat.buckets:
        world.broadcast(vector[bucket.span.start : bucket.span.stop], f"load.{kind}.{bucket.index}").land()
    return vector
