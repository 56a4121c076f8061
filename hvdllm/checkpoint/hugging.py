"""Reads the weights of a folder of transformers into a vector over the flat map, one tensor at a time.

Names, types and shapes are compared with the model's before anything is read. Tensors of 16 bits are widened one by
one, so that beside the vector no more than one tensor is in memory. Only safetensors are read: a .bin may run
any program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.models.hugging import (
    HEAD,
    NO_PARAMETERS,
    UNUSED,
    Described,
    Settings,
    Source,
    described,
    root_of,
    sources,
    whole_name,
)  # fmt: skip
from hvdllm.paths import short

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UNSAFE = ("pytorch_model.bin", "pytorch_model.bin.index.json")
MOST_INDEX = 2**26  # bytes of an index, which has about 100 for each tensor
MOST_FILES = 10_000
FLOATS = ("F64", "F32", "F16", "BF16")
ROWS = 4096  # of the output layer, which are compared with the embedding at a time


class Place(NamedTuple):
    """Where a tensor is: the open file, its name there, its type and its shape."""

    file: Any
    key: str
    dtype: str
    shape: tuple[int, ...]


def check(folder: Path, settings: Settings) -> None:
    """Raises UserError if the tensors of a folder are not those of a model of these settings."""
    with _opened(folder) as found:
        _fitting(found, described(folder), settings)


def left_out(folder: Path) -> str:
    """What a run does not take from a folder that it begins with, in words; empty if it takes all."""
    if described(folder).kind != "bert":
        return ""
    with _opened(folder) as found:
        unused = sorted({key.split(".")[1] for key in map(_bert_name, found) if UNUSED.fullmatch(key)})
    return "its first segment is added to its positions" + "".join(f", its {name} is left out" for name in unused)


def fill(folder: Path, settings: Settings, view: Callable[[str], torch.Tensor]) -> None:
    """Fills a model's parameters with the weights of a folder. view: gives the place of each by its name.

    Raises UserError if a tensor is missing, is one too many, or has another shape, another type than a float of 16, 32
    or 64 bits, or numbers that are not finite.
    """
    with _opened(folder) as found:
        for source, place in _fitting(found, described(folder), settings):
            values = place.file.get_tensor(place.key)
            if not bool(values.isfinite().all()):
                raise UserError(f"its tensor `{short(place.key)}` has numbers that are not finite: take another file")
            rows = view(source.name)[source.start : source.stop]
            if source.added:
                rows.add_(values[:1].to(rows))
            else:
                rows.copy_((values.T if source.transposed else values)[: len(rows)])


# ------------------------------------------------------------------ inside
def _bert_name(key: str) -> str:
    return whole_name(key, "bert")


def _fitting(found: dict[str, Place], about: Described, settings: Settings) -> list[tuple[Source, Place]]:
    """Each tensor of the model with its place. Raises UserError if there is another one, or if one does not fit."""
    places: dict[str, Place] = {}
    for key, place in found.items():
        name = whole_name(key, about.kind)
        if NO_PARAMETERS.fullmatch(key) or (about.kind == "bert" and UNUSED.fullmatch(name)):
            continue
        if name in places:
            _check_equal(place, places[name])
        places[name] = place
    wanted = list(sources(about.kind, settings, about.settings["vocab"], about.positions, about.segments))
    spare = places.pop(HEAD, None) if getattr(settings, "tied", True) else None
    for source in wanted:
        if source.key not in places and source.key.startswith("cls."):
            raise UserError(f"it has no tensor `{source.key}`, of the head that guesses tokens: take a BertForMaskedLM")
        if source.key not in places:
            raise UserError(f"it has no tensor `{source.key}`, which its config.json asks for: take the whole folder")
    if others := sorted(places.keys() - {source.key for source in wanted}):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise UserError(
            f"it has a tensor `{short(others[0])}`{more}, which the model of its config.json has not: take the files "
            "that belong together"
        )
    for source in wanted:
        _check(places[source.key], source.shape)
    if spare is not None:
        _check(spare, wanted[0].shape)
        _check_tied(spare, places[wanted[0].key])
    return [(source, places[source.key]) for source in wanted]


def _check(place: Place, shape: tuple[int, ...]) -> None:
    key = short(place.key)
    if place.shape != shape:
        raise UserError(f"its tensor `{key}` is {_size(place.shape)}, and its config.json asks for {_size(shape)}")
    if place.dtype not in FLOATS:
        raise UserError(f"its tensor `{key}` holds {place.dtype}, and weights are one of {', '.join(FLOATS)}")


def _size(shape: tuple[int, ...]) -> str:
    return short(" x ".join(map(str, shape))) or "a single number"


def _check_tied(head: Place, embed: Place) -> None:
    """Raises UserError if the output layer of a file is not the embedding, which its config.json says it is."""
    left, right = head.file.get_slice(head.key), embed.file.get_slice(embed.key)
    for start in range(0, embed.shape[0], ROWS):
        if not torch.equal(left[start : start + ROWS], right[start : start + ROWS]):
            raise UserError(
                f"its `{HEAD}` differs from its embedding, and its config.json says tie_word_embeddings=true: save the "
                "model again with save_pretrained"
            )


def _check_equal(one: Place, other: Place) -> None:
    """Raises UserError if a file has other numbers under the two names of a tensor."""
    if one.shape != other.shape or not torch.equal(one.file.get_tensor(one.key), other.file.get_tensor(other.key)):
        raise UserError(
            f"its tensors `{short(one.key)}` and `{short(other.key)}` differ and should be one: save the model again "
            "with save_pretrained"
        )


@contextmanager
def _opened(folder: Path) -> Iterator[dict[str, Place]]:
    """All tensors of a folder by name, while their files are open. Raises UserError if a file cannot be read."""
    root, name = root_of(folder), WHOLE
    try:
        with ExitStack() as held:
            found: dict[str, Place] = {}
            indexed = _index(folder)
            for name in sorted({*indexed.values()}) if indexed else [WHOLE]:
                untrusted.opened(folder / name, root).close()  # raises if it is no regular file
                file = held.enter_context(safe_open(untrusted.within(folder / name, root), framework="pt"))
                for key in file.keys():  # noqa: SIM118 - not a dict
                    if key in found:
                        raise UserError(
                            f"its tensor `{short(key)}` is in two files: take the files that belong together"
                        )
                    head = file.get_slice(key)
                    found[key] = Place(file, key, head.get_dtype(), tuple(head.get_shape()))
            if odd := sorted(indexed.keys() ^ found.keys()) if indexed else []:
                raise UserError(f"its {INDEX} and its files differ, first in `{short(odd[0])}`: take the whole folder")
            yield found
    except (OSError, SafetensorError, untrusted.Unfit) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"its {short(name)} cannot be read ({why}): take the whole folder") from None


def _index(folder: Path) -> dict[str, str]:
    """The file of each tensor as the index says it; nothing if there is one file alone."""
    if (folder / WHOLE).exists():
        return {}
    if not (folder / INDEX).exists():
        if unsafe := next((name for name in UNSAFE if (folder / name).exists()), None):
            raise UserError(
                f"its weights are in {unsafe}, whose format may run any program when it is read: save the model "
                "again with save_pretrained, as safetensors"
            )
        raise UserError(f"it has neither {WHOLE} nor {INDEX}: take the whole folder")
    try:
        values = untrusted.read_json(folder / INDEX, MOST_INDEX, root_of(folder))
    except (OSError, untrusted.Unfit) as error:
        raise UserError(f"its {INDEX} cannot be read ({error}): take the whole folder") from None
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise UserError(f"its {INDEX} has no weight_map of file names: save the model again with save_pretrained")
    names = {*files.values()}
    odd = next((name for name in sorted(names) if "/" in name or not name.endswith(".safetensors")), None)
    if odd is not None or len(names) > MOST_FILES:
        what = f"{len(names):,} files" if odd is None else f"`{short(odd)}`, which is no safetensors file beside it"
        raise UserError(f"its {INDEX} names {what}: save the model again with save_pretrained")
    return dict(files)
