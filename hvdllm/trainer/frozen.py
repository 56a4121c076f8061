"""Weights that are not trained (model.lora_rank): written to a run's folder once, and read again by every life of it.

They are no part of the flat map. So they do not travel, are not clipped, and are in no checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from hvdllm import runs, sums, untrusted
from hvdllm.checkpoint import read
from hvdllm.errors import RunError, UserError
from hvdllm.flat import TensorPart
from hvdllm.models.gpt import GPT
from hvdllm.models.lora import adapt, merge
from hvdllm.models.parts import Model
from hvdllm.tables import Table
from hvdllm.world.base import World


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are not trained, by name. Those of tables are, though not by autograd (tables.py)."""
    tables = {id(p) for module in model.modules() if isinstance(module, Table) for p in module.parameters()}
    return {name: p for name, p in model.named_parameters() if not p.requires_grad and id(p) not in tables}


class Places:
    """Stands for the flat map where weights are read that are no part of it."""

    def __init__(self, parameters: dict[str, nn.Parameter]) -> None:
        self.parameters = parameters
        self.at = {name: slice(0, p.numel()) for name, p in parameters.items()}

    @torch.no_grad()
    def paste(self, parts: list[TensorPart], vector: torch.Tensor) -> None:
        for name, start, values in parts:
            self.parameters[name].view(-1)[start : start + values.numel()] = values.reshape(-1).to(vector)


def begin(model: nn.Module, path: Path, kind: str, world: World) -> None:
    """Takes the frozen weights from a checkpoint, or a final/, of a run that trained them. Collective.

    Args:
        model: with adapters.
        path: of the checkpoint.
        kind: as checkpoint.read.read_vector takes it.
        world: the ranks.

    Raises UserError on every rank if they do not fit.
    """
    places = Places(named(model))
    some = next(iter(places.parameters.values())).detach()
    share(model, lambda: read.read_vector(path, kind, places, some), world)


def merged(folder: Path, path: Path, kind: str, settings: Model, like: GPT) -> dict[str, torch.Tensor]:
    """The weights of a run that trained adapters, with these added to them, by name, on the CPU.

    Args:
        folder: of the run, which holds its frozen weights.
        path: of its checkpoint, or its final/, which holds its adapters.
        kind: as checkpoint.read.read_vector takes it.
        settings: of its model.
        like: a model with as many tokens, in the dtype that is wanted.

    Raises UserError if they do not fit.
    """
    theirs = GPT(settings, len(like.embed.weight)).to(like.embed.weight.dtype)
    adapt(theirs, 0)
    adapters = Places({name: p for name, p in theirs.named_parameters() if p.requires_grad})
    read.read_vector(path, kind, adapters, theirs.embed.weight.detach())
    load(folder, theirs)
    return {name: p.detach() for name, p in merge(theirs).named_parameters()}


def share(model: nn.Module, fill: Callable[[], None], world: World) -> None:
    """Rank 0 fills the frozen weights, and all others get them. Collective. Raises UserError on every rank."""
    problem = None
    if world.rank == 0:
        try:
            fill()
        except UserError as error:
            problem = str(error)
    world.agree(problem, "load.frozen")
    for index, p in enumerate(named(model).values()):
        there = p.detach().cpu().contiguous()
        world.broadcast(there.view(-1), f"load.frozen.{index}").land()
        p.detach().copy_(there)


def keep(folder: Path, model: nn.Module) -> dict[str, str]:
    """Writes the frozen weights into a run's folder if they are not there yet. Returns the sum of the file by its name.

    Raises RunError if the disk refuses.
    """
    weights, path = named(model), folder / runs.FROZEN
    if not weights:
        return {}
    known = runs.file_sum(folder, runs.FROZEN) if (folder / "config.yaml").exists() and path.is_file() else None
    if known is not None and sums.of_file(path, folder) == known and _holds(path, weights):
        return {runs.FROZEN: known}
    beside = folder / f".{runs.FROZEN}"
    try:
        save_file({name: p.detach().cpu().contiguous() for name, p in weights.items()}, beside)
        digest = sums.of_file(beside)
        beside.replace(path)
        runs.sync_folder(folder)
    except (OSError, RuntimeError, SafetensorError, untrusted.Unfit) as error:
        beside.unlink(missing_ok=True)
        raise RunError(f"cannot write {path} ({error}): free some space and start again") from None
    return {runs.FROZEN: digest}


@torch.no_grad()
def _holds(path: Path, weights: dict[str, nn.Parameter]) -> bool:
    """Whether the file has these weights."""
    with safe_open(path, framework="pt") as file:
        return set(file.keys()) == weights.keys() and all(
            torch.equal(file.get_tensor(name).to(p.dtype), p.detach().cpu()) for name, p in weights.items()
        )


@torch.no_grad()
def load(folder: Path, model: nn.Module) -> None:
    """Reads the frozen weights of a run's folder, which may be a stranger's, one tensor at a time.

    Raises UserError if they are not what was written, or do not fit the model.
    """
    weights, path = named(model), folder / runs.FROZEN
    if not weights:
        return
    try:
        if runs.file_sum(folder, runs.FROZEN) != sums.of_file(path, folder):
            raise UserError(f"{path} is not what was written: copy the run's folder again")
        with safe_open(untrusted.within(path, folder), framework="pt") as file:
            theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            ours = {name: tuple(p.shape) for name, p in weights.items()}
            if odd := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
                raise UserError(f"{path} does not fit this model: `{odd[0]}` is missing, unknown or of another shape")
            for name, p in weights.items():
                values = file.get_tensor(name)
                if not values.is_floating_point() or not bool(values.isfinite().all()):
                    raise UserError(f"{path} cannot be used: `{name}` has numbers that are not finite")
                p.copy_(values)
    except (OSError, SafetensorError, untrusted.Unfit) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the run's folder again") from None
