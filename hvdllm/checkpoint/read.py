"""Finding the newest whole checkpoint and reading it, whatever world size wrote it.

The functions named load_ and share_ are collective: where a rank cannot read, every rank raises UserError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open

from hvdllm.checkpoint.write import not_shared, steps
from hvdllm.errors import UserError
from hvdllm.trainer.flat import Flat, Part
from hvdllm.world.base import World, from_first

T = TypeVar("T")


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


def saved_ranks(state: dict[str, Any]) -> int:
    """How many ranks wrote the checkpoint of this state.json."""
    return len(state["mine"])


# ------------------------------------------------------------------ by one rank
def read_vector(path: Path, kind: str, flat: Flat, vector: torch.Tensor) -> None:
    """Fills a vector over the map with `kind`: model, m, v; "" in final/. The ranges of all ranks are put together.

    Raises UserError where a tensor misfits: another model, a range that is missing or there twice.
    """
    parts = sorted(_parts(path, "*", kind, flat), key=lambda part: part.start)
    covered = dict.fromkeys(flat.at, 0)
    overlap = None
    for name, start, values in parts:
        overlap = overlap or (name if start < covered[name] else None)
        covered[name] += values.numel()
    for name, count in covered.items():
        if count != flat.parameters[name].numel():
            raise UserError(f"checkpoint {path} does not fit this model: `{kind}/{name}` has {count} elements there")
    if overlap is not None:
        raise UserError(f"checkpoint {path} cannot be read: ranges of `{kind}/{overlap}` overlap")
    flat.paste(parts, vector)


def kinds_of(path: Path, group: str) -> list[str]:
    """The kinds of `summed` or `local` vectors that any rank wrote."""
    kinds: set[str] = set()
    with _readable(path):
        for file in path.glob("*.safetensors"):
            with safe_open(file, framework="pt") as tensors:
                kinds |= {key.rpartition("/")[0] for key in tensors.keys() if key.startswith(f"{group}.")}  # noqa: SIM118
    return sorted(kind.removeprefix(f"{group}.") for kind in kinds)


def read_ranks(path: Path, kind: str, flat: Flat, rank: int | None) -> torch.Tensor:
    """A vector over the map: what this rank wrote of a kind (`summed.residual`, `local.x`), or (None) the sum over all
    ranks, in rank order.

    On the CPU; zero where nothing was written. Raises UserError where a tensor misfits.
    """
    vector = torch.zeros_like(flat.x, device="cpu")
    for name, start, values in _parts(path, "*" if rank is None else f"rank-{rank:05d}", kind, flat):
        vector[flat.at[name]][start : start + values.numel()] += values.reshape(-1).to(vector)
    return vector


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of any shape, by name, on the CPU."""
    entries = _entries(path, "*", lambda key: key.startswith("tensor/"))
    return {key.removeprefix("tensor/"): values for key, values in entries}


# ------------------------------------------------------------------ by all ranks
def share_vector(path: Path | None, kind: str, flat: Flat, world: World) -> torch.Tensor:
    """Rank 0 reads `kind` and broadcasts it, bucket by bucket; every rank gets the whole vector, on the CPU: a GPU has
    room for the pieces that it owns. Collective."""
    vector = torch.zeros_like(flat.x, device="cpu")

    def read() -> None:
        if world.rank == 0:
            assert path is not None
            read_vector(path, kind, flat, vector)

    _together(read, world)
    for bucket in flat.buckets:
        world.broadcast(vector[bucket.span.start : bucket.span.stop], f"load.{kind}.{bucket.index}").land()
    return vector


def load_summed(path: Path, flat: Flat, world: World, ranks: int) -> dict[str, torch.Tensor]:
    """Vectors over the map by kind; their sum over ranks is what it was when `ranks` ranks wrote them. Collective.

    At the same world size each rank gets its own back, which needs a shared runs_dir; else rank 0 gets the sum over
    all and the others zeros.
    """

    def read() -> dict[str, torch.Tensor]:
        rank = world.rank if ranks == world.size else None
        if rank is None and world.rank:
            return {kind: torch.zeros_like(flat.x, device="cpu") for kind in kinds}
        if not path.is_dir():
            raise UserError(not_shared(path))
        return {kind: read_ranks(path, f"summed.{kind}", flat, rank) for kind in kinds}

    kinds = from_first(world, lambda: kinds_of(path, "summed"), "load.kinds")
    return _together(read, world) if kinds else {}


def load_local(path: Path, flat: Flat, world: World, ranks: int) -> dict[str, torch.Tensor]:
    """Vectors over the map by kind, what this rank wrote of its own; {} where `ranks`, who wrote, are not as many as
    now. Needs a shared runs_dir. Collective."""

    def read() -> dict[str, torch.Tensor]:
        if not path.is_dir():
            raise UserError(not_shared(path))
        return {kind: read_ranks(path, f"local.{kind}", flat, world.rank) for kind in kinds}

    kinds = from_first(world, lambda: kinds_of(path, "local"), "load.kinds")
    return _together(read, world) if kinds and ranks == world.size else {}


def share_tensors(path: Path, world: World) -> dict[str, torch.Tensor]:
    """Rank 0 reads the tensors of any shape and broadcasts them, as bytes; every rank gets all, on the CPU.
    Collective."""
    tensors = _together(lambda: read_tensors(path) if world.rank == 0 else {}, world)
    heads = [(name, list(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()]
    for index, (name, shape, dtype) in enumerate(json.loads(world.texts(json.dumps(heads), "load.tensors")[0])):
        if world.rank:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensors[name].numel():
            world.broadcast(tensors[name].reshape(-1).view(torch.uint8), f"load.tensor.{index}").land()
    return tensors


def _together(read: Callable[[], T], world: World) -> T:
    """What each rank reads; where one cannot, no rank goes on to wait for it."""
    value, problem = None, None
    try:
        value = read()
    except UserError as error:
        problem = str(error)
    world.agree(problem, "load.problem")
    return cast(T, value)


# ------------------------------------------------------------------ files
def _parts(path: Path, files: str, kind: str, flat: Flat) -> Iterator[Part]:
    """What the files hold of this model's tensors under `kind`."""
    for key, values in _entries(path, files, lambda key: key.rpartition("/")[0] == kind):
        name, _, start = key.rpartition("/")[2].partition("@")
        if name not in flat.at:
            continue
        if not (start or "0").isdecimal() or int(start or 0) + values.numel() > flat.parameters[name].numel():
            raise UserError(
                f"checkpoint {path} does not fit this model: `{key}` has {values.numel()} elements there, beyond the "
                "tensor's end"
            )
        yield Part(name, int(start or 0), values)


def _entries(path: Path, files: str, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    with _readable(path):
        for file in sorted(path.glob(f"{files}.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                for key in filter(wanted, tensors.keys()):
                    yield key, tensors.get_tensor(key)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file that cannot be read becomes one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
