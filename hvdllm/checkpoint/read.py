"""Finding the newest whole checkpoint and reading it, whatever world size wrote it.

The functions named load_ and share_ are collective: where a rank cannot read, every rank raises UserError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open

from hvdllm import untrusted
from hvdllm.checkpoint.whole import broken, newest, steps
from hvdllm.checkpoint.write import not_shared
from hvdllm.errors import UserError
from hvdllm.flat import Flat, Part
from hvdllm.plain import Json
from hvdllm.world.base import World, from_first

__all__ = ["broken", "newest", "steps"]  # and what stands below

WEIGHTS = ("model", "")  # kinds
FLOATS = {"F32", "F64"}  # of the vectors over the map
OF_A_RUN = {"horizon": int, "data_hash": str, "seconds": float | int, "kinds": list, "stream": dict, "due": dict}
MOST_STATE = 2**28  # bytes of a state.json: some hundred a rank, and some a lane
T = TypeVar("T")


def read_state(path: Path) -> Json:
    """state.json of a whole checkpoint. Raises UserError."""
    try:
        values = untrusted.read_json(path / "state.json", MOST_STATE, path)
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"checkpoint {path} cannot be read: state.json {error}") from None
    shared = values.get("shared") if isinstance(values, dict) else None
    mine = values.get("mine") if isinstance(values, dict) else None
    if not isinstance(shared, dict) or not (isinstance(mine, list) and mine):
        raise UserError(f"checkpoint {path} cannot be read: state.json holds no state of a run")
    return dict(values)


def read_run(path: Path) -> Json:
    """state.json of a whole checkpoint, with all that a run needs to go on. Raises UserError."""
    values = read_state(path)
    tokens_of(values, path)
    numbers = {f"shared.{key}": values["shared"].get(key) for key in ("step", "round", "steps")}
    odd = next((key for key, number in numbers.items() if not isinstance(number, int | None)), None)
    odd = odd or next((key for key, kind in OF_A_RUN.items() if not isinstance(values.get(key), kind)), None)
    if odd is not None:
        raise UserError(f"checkpoint {path} cannot be gone on from: its state has no `{odd}`")
    return values


def alike(ours: Any, theirs: Any) -> bool:
    """Has a plain value the form of ours: numbers, texts, lists and groups of values at the same places? A None of ours
    is like anything; what only one of them names, another version may have."""
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(alike(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
    if ours is None or theirs is None:
        return True
    numbers = (int, float)
    return isinstance(theirs, type(ours)) or (isinstance(ours, numbers) and isinstance(theirs, numbers))


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Around what takes plain values from a checkpoint: one that is missing or of another type becomes a sentence."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"checkpoint {path} does not fit this version of hvdllm, or was changed ({type(error).__name__}: {error})"
        ) from None


def tokens_of(state: Json, path: Path) -> int:
    """Committed at the checkpoint of this state. Raises UserError where it does not say."""
    tokens = state["shared"].get("tokens")
    if not isinstance(tokens, int):
        raise UserError(f"checkpoint {path} cannot be gone on from: its state has no `tokens`")
    return tokens


def saved_ranks(state: Json) -> int:
    """How many ranks wrote the checkpoint of this state.json."""
    return len(state["mine"])


# ------------------------------------------------------------------ by one rank
def read_vector(path: Path, kind: str, flat: Flat, vector: torch.Tensor) -> None:
    """Fills a vector over the map with `kind`: model, m, v; "" in final/. The ranges of all ranks are put together.

    Raises UserError where a tensor misfits: another model, a range that is missing or there twice, tensors of no
    parameter, numbers of another kind, weights that are not finite.
    """
    _refuse_others(path, flat)
    parts = sorted(_parts(path, "*", kind, flat), key=lambda part: part.start)
    covered = dict.fromkeys(flat.at, 0)
    overlap = None
    for name, start, values in parts:
        if kind in WEIGHTS and not bool(values.isfinite().all()):
            raise UserError(f"checkpoint {path} cannot be used: `{name}` has numbers that are not finite")
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
    for _, key, _ in _heads(path, "*"):
        kinds |= {key.rpartition("/")[0]} if key.startswith(f"{group}.") else set()
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
def count_weights(path: Path) -> int:
    """How many numbers the weights of a checkpoint, or of a final/, are, by the files' heads alone."""
    heads = ((key, math.prod(head.get_shape())) for _, key, head in _heads(path, "*"))
    return sum(count for key, count in heads if key.rpartition("/")[0] in WEIGHTS)


def _parts(path: Path, files: str, kind: str, flat: Flat) -> Iterator[Part]:
    """What the files hold of this model's tensors under `kind`."""
    for key, values in _entries(path, files, lambda key: key.rpartition("/")[0] == kind, FLOATS):
        name, _, start = key.rpartition("/")[2].partition("@")
        whole = flat.parameters[name]
        if not (start or "0").isdecimal() or int(start or 0) + values.numel() > whole.numel():
            raise UserError(
                f"checkpoint {path} does not fit this model: `{key}` has {values.numel()} elements there, beyond the "
                "tensor's end"
            )
        if not start and values.numel() == whole.numel() and values.shape != whole.shape:
            raise UserError(f"checkpoint {path} does not fit this model: `{key}` has another shape there")
        yield Part(name, int(start or 0), values)


def _refuse_others(path: Path, flat: Flat) -> None:
    """Raises UserError where the files have tensors of no parameter, or of a kind that the state does not name."""
    known: Any = read_state(path).get("kinds") if (path / "state.json").exists() else None
    known = [] if (path / "model.safetensors").exists() else known
    for _, key, _ in _heads(path, "*"):
        kind, _, name = key.rpartition("/")
        if kind.startswith("tensor"):
            continue
        named = (
            kind in WEIGHTS or kind.startswith(("summed.", "local.")) or not isinstance(known, list) or kind in known
        )
        if not named or name.partition("@")[0] not in flat.at:
            raise UserError(f"checkpoint {path} does not fit this model: `{key}` is a tensor that it has not")


def _entries(
    path: Path, files: str, wanted: Callable[[str], bool], types: set[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    for tensors, key, head in _heads(path, files):
        if wanted(key):
            if types is not None and head.get_dtype() not in types:
                raise UserError(
                    f"checkpoint {path} cannot be used: `{key}` holds {head.get_dtype()}, which is none of "
                    f"{', '.join(sorted(types))}"
                )
            yield key, tensors.get_tensor(key)


def _heads(path: Path, files: str) -> Iterator[tuple[Any, str, Any]]:
    """Of each tensor of the files: its open file, its name, and its head, which has its type and shape."""
    with _readable(path):
        for file in sorted(path.glob(f"{files}.safetensors")):
            untrusted.opened(file, path).close()  # a regular one
            with safe_open(untrusted.within(file, path), framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield tensors, key, tensors.get_slice(key)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """A file that cannot be read becomes one sentence."""
    try:
        yield
    except (OSError, SafetensorError, untrusted.Unfit) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
