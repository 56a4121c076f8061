"""Reading a checkpoint, whatever number of ranks wrote it.

The functions named load_ and share_ are collective: if one rank cannot read, every rank raises UserError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hvdllm import untrusted
from hvdllm.checkpoint.whole import broken, newest, read_state, steps
from hvdllm.checkpoint.write import not_shared
from hvdllm.errors import UserError
from hvdllm.flat import Flat, TensorPart
from hvdllm.plain import Json
from hvdllm.world.base import World, from_first

__all__ = ["broken", "newest", "steps"]  # from whole.py; what is defined below is public too

WEIGHTS = ("model", "")  # the kinds of tensors that are weights
TABLES = "tensor/table."  # what the names of the weights of tables begin with
FLOATS = {"F32", "F64"}  # types of the vectors over the map
OF_A_RUN = {"horizon": int, "data_hash": str, "seconds": float | int, "kinds": list, "stream": dict, "due": dict}
T = TypeVar("T")


def read_run(path: Path) -> Json:
    """The state.json of a complete checkpoint, with all that a run needs to go on.

    Raises UserError if it cannot be read or lacks something.
    """
    values = read_state(path)
    tokens_of(values, path)
    numbers = {f"shared.{key}": values["shared"].get(key) for key in ("step", "round", "steps")}
    odd = next((key for key, number in numbers.items() if not isinstance(number, int | None)), None)
    odd = odd or next((key for key, kind in OF_A_RUN.items() if not isinstance(values.get(key), kind)), None)
    if odd is not None:
        raise UserError(f"checkpoint {path} cannot be gone on from: its state has no `{odd}`")
    return values


def alike(ours: object, theirs: object) -> bool:
    """Whether a plain value has the form of ours: numbers, texts, lists and dicts at the same places.

    None is like anything. A key that only one of them has is ignored, because another version may have added it.
    """
    if isinstance(ours, dict):
        return isinstance(theirs, dict) and all(alike(ours[key], theirs[key]) for key in ours.keys() & theirs.keys())
    if ours is None or theirs is None:
        return True
    numbers = (int, float)
    return isinstance(theirs, type(ours)) or (isinstance(ours, numbers) and isinstance(theirs, numbers))


@contextmanager
def fitting(path: Path) -> Iterator[None]:
    """Wraps code that takes plain values from a checkpoint.

    A value that is missing or of another type becomes a UserError with one sentence.
    """
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError, OverflowError) as error:
        raise UserError(
            f"checkpoint {path} does not fit this version of hvdllm, or was changed ({type(error).__name__}: {error})"
        ) from None


def tokens_of(state: Json, path: Path) -> int:
    """The tokens committed at the checkpoint of this state. Raises UserError if the state does not say."""
    tokens = state["shared"].get("tokens")
    if not isinstance(tokens, int):
        raise UserError(f"checkpoint {path} cannot be gone on from: its state has no `tokens`")
    return tokens


def saved_ranks(state: Json) -> int:
    """How many ranks wrote the checkpoint of this state.json."""
    return len(state["mine"])


# ------------------------------------------------------------------ by one rank
class Places(Protocol):
    """What of the flat map reading needs: the elements of each tensor, and where they go."""

    at: dict[str, slice]
    parameters: dict[str, nn.Parameter]

    def paste(self, parts: list[TensorPart], vector: torch.Tensor) -> None: ...


def read_vector(path: Path, kind: str, flat: Places, vector: torch.Tensor) -> None:
    """Fills a vector over the map with the ranges that all ranks wrote.

    Args:
        path: the checkpoint, or a final/.
        kind: `model`, `m`, `v`; "" for a final/.
        flat: the map.
        vector: is filled in place.

    Raises UserError if a tensor does not fit: it is of another model or of no parameter, a range is missing or there
    twice, the numbers are of another type, or weights are not finite.
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
    """The kinds of vectors that any rank wrote in a group, `summed` or `local`."""
    kinds: set[str] = set()
    for _, key, _ in _heads(path, "*"):
        kinds |= {key.rpartition("/")[0]} if key.startswith(f"{group}.") else set()
    return sorted(kind.removeprefix(f"{group}.") for kind in kinds)


def read_ranks(path: Path, kind: str, flat: Flat, rank: int | None) -> torch.Tensor:
    """What one rank wrote of a kind (`summed.residual`, `local.x`), as a vector over the map on the CPU.

    With rank=None it is the sum over all ranks, in rank order. Where nothing was written the vector is zero. Raises
    UserError if a tensor does not fit.
    """
    vector = torch.zeros_like(flat.x, device="cpu")
    for name, start, values in _parts(path, "*" if rank is None else f"rank-{rank:05d}", kind, flat):
        vector[flat.at[name]][start : start + values.numel()] += values.reshape(-1).to(vector)
    return vector


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of any shape that a checkpoint holds, by name, on the CPU."""
    entries = _entries(path, "*", lambda key: key.startswith("tensor/"))
    return {key.removeprefix("tensor/"): values for key, values in entries}


# ------------------------------------------------------------------ by all ranks
def share_vector(path: Path | None, kind: str, flat: Flat, world: World) -> torch.Tensor:
    """Rank 0 reads a kind of vector and broadcasts it, bucket by bucket. Collective.

    Every rank gets the whole vector on the CPU, because a GPU may have room only for the pieces that it owns.
    """

    def read(vector: torch.Tensor) -> None:
        assert path is not None
        read_vector(path, kind, flat, vector)

    return share_filled(read, kind, flat, world)


def share_filled(fill: Callable[[torch.Tensor], None], kind: str, flat: Flat, world: World) -> torch.Tensor:
    """Rank 0 fills a vector over the map, on the CPU, and broadcasts it, bucket by bucket. Collective.

    `kind` names the collectives. If `fill` raises UserError, every rank does.
    """
    vector = torch.zeros_like(flat.x, device="cpu")
    _together(lambda: fill(vector) if world.rank == 0 else None, world)
    for bucket in flat.buckets:
        world.broadcast(vector[bucket.span.start : bucket.span.stop], f"load.{kind}.{bucket.index}").land()
    return vector


def load_summed(path: Path, flat: Flat, world: World, ranks: int) -> dict[str, torch.Tensor]:
    """The `summed` vectors over the map, by kind. Collective.

    Their sum over the ranks is what it was when `ranks` ranks wrote them. With the same number of ranks each rank gets
    its own vectors back, which needs a shared runs_dir. Otherwise rank 0 gets the sum over all of them, and the others
    get zeros.
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
    """The `local` vectors over the map that this rank wrote, by kind. Collective.

    There are none if `ranks`, the number of ranks that wrote, is another than now. Needs a shared runs_dir.
    """

    def read() -> dict[str, torch.Tensor]:
        if not path.is_dir():
            raise UserError(not_shared(path))
        return {kind: read_ranks(path, f"local.{kind}", flat, world.rank) for kind in kinds}

    kinds = from_first(world, lambda: kinds_of(path, "local"), "load.kinds")
    return _together(read, world) if kinds and ranks == world.size else {}


def share_tensors(path: Path, world: World) -> dict[str, torch.Tensor]:
    """Rank 0 reads the tensors of any shape and broadcasts them as bytes. Collective.

    Every rank gets all of them, on the CPU.
    """
    tensors = _together(lambda: read_tensors(path) if world.rank == 0 else {}, world)
    heads = [(name, list(x.shape), str(x.dtype).removeprefix("torch.")) for name, x in tensors.items()]
    for index, (name, shape, dtype) in enumerate(json.loads(world.texts(json.dumps(heads), "load.tensors")[0])):
        if world.rank:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
        if tensors[name].numel():
            world.broadcast(tensors[name].reshape(-1).view(torch.uint8), f"load.tensor.{index}").land()
    return tensors


def _together(read: Callable[[], T], world: World) -> T:
    """What this rank reads. If one rank cannot read, all raise, so that none waits for it."""
    value, problem = None, None
    try:
        value = read()
    except UserError as error:
        problem = str(error)
    world.agree(problem, "load.problem")
    return cast(T, value)


# ------------------------------------------------------------------ files
def count_weights(path: Path) -> int:
    """How many numbers the weights of a checkpoint or of a final/ have. Only the heads of the files are read."""
    heads = ((key, math.prod(head.get_shape())) for _, key, head in _heads(path, "*"))
    return sum(count for key, count in heads if key.rpartition("/")[0] in WEIGHTS or key.startswith(TABLES))


def _parts(path: Path, files: str, kind: str, flat: Places) -> Iterator[TensorPart]:
    """The ranges of this model's tensors that the files hold under a kind."""
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
        yield TensorPart(name, int(start or 0), values)


def _refuse_others(path: Path, flat: Places) -> None:
    """Raises UserError if the files hold tensors of no parameter, or of a kind that the state does not name."""
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
    """For each tensor in the files: the open file, the name, and the head, which has the type and the shape."""
    with _readable(path):
        for file in sorted(path.glob(f"{files}.safetensors")):
            untrusted.opened(file, path).close()  # raises if it is no regular file
            with safe_open(untrusted.within(file, path), framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118
                    yield tensors, key, tensors.get_slice(key)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns a file that cannot be read into a UserError with one sentence."""
    try:
        yield
    except (OSError, SafetensorError, untrusted.Unfit) as error:
        raise UserError(f"checkpoint {path} cannot be read: {error}") from None
