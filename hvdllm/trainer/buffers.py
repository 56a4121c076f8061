"""Buffers of a model: numbers that it keeps and no optimizer changes, such as the running means of BatchNorm.

Each rank keeps its own while it trains. At every mark at which the weights are evaluated, sampled or saved they become
the mean over the ranks that train, so all ranks evaluate and save the same. Running means are linear in what they are
made of. Their mean over ranks is therefore the same up to rounding, whenever it is taken.
"""

from __future__ import annotations

import torch
from torch import nn

from hvdllm.errors import UserError
from hvdllm.world.base import World

PREFIX = "buffer."  # of their names among the tensors of a checkpoint


def named(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that belong into a checkpoint, by name."""
    kept = model.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def average(model: nn.Module, world: World, trains: bool) -> None:
    """Makes each buffer the mean over the ranks that train. Collective, where a model has buffers.

    Args:
        model: on every rank.
        world: the ranks.
        trains: whether this rank has computed anything; a server has not, and its buffers do not count.
    """
    buffers = named(model)
    if not buffers or world.size == 1:
        return
    own = torch.cat([buffer.detach().double().cpu().reshape(-1) for buffer in buffers.values()])
    weighted = torch.cat([own, own.new_ones(1)]) * float(trains)
    total: torch.Tensor = world.sum(weighted, "act.buffers").land()
    if total[-1] == 0:
        return
    mean, at = total[:-1] / total[-1], 0
    for buffer in buffers.values():
        values = mean[at : at + buffer.numel()].view(buffer.shape)
        buffer.copy_(values if buffer.is_floating_point() else values.round())
        at += buffer.numel()


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers as a checkpoint holds them, by name."""
    return {f"{PREFIX}{name}": buffer for name, buffer in named(model).items()}


@torch.no_grad()
def load(model: nn.Module, found: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    """Takes the buffers from the tensors of a checkpoint, and returns the other tensors.

    Args:
        model: whose buffers are filled.
        found: the tensors by name.
        where: the checkpoint, for the sentence of the error.

    Raises UserError if a buffer is missing, unknown or of another shape, or if it is not finite.
    """
    buffers = named(model)
    theirs = {name.removeprefix(PREFIX): x for name, x in found.items() if name.startswith(PREFIX)}
    if odd := sorted(buffers.keys() ^ theirs.keys()):
        raise UserError(f"checkpoint {where} does not fit this model: the buffer `{odd[0]}` is in one of them alone")
    for name, buffer in buffers.items():
        if theirs[name].shape != buffer.shape or theirs[name].is_floating_point() != buffer.is_floating_point():
            raise UserError(f"checkpoint {where} does not fit this model: the buffer `{name}` has another form there")
        if not bool(theirs[name].isfinite().all()):
            raise UserError(f"checkpoint {where} cannot be used: the buffer `{name}` has numbers that are not finite")
        buffer.copy_(theirs[name])
    return {name: x for name, x in found.items() if not name.startswith(PREFIX)}
