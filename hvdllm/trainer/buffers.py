"""What a model has beside the parameters of the flat map: buffers, and tables (hvdllm/tables.py).

Buffers are numbers that no optimizer changes, such as the running means of BatchNorm.

Each rank keeps its own while it trains. At every mark at which the weights are evaluated, sampled or saved they become
the mean over the ranks that train, so all ranks evaluate and save the same. Running means are linear in what they are
made of. Their mean over ranks is therefore the same up to rounding, whenever it is taken. Tables are equal on all
ranks.
"""

from __future__ import annotations

import torch
from torch import nn

from hvdllm.errors import UserError
from hvdllm.tables import Table
from hvdllm.world.base import World

# Prefixes of names among the tensors of a checkpoint: of buffers, of tables, and of what their optimizers keep.
PREFIX, TABLE, SQUARES = "buffer.", "table.", "squares."


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


def tensors(model: nn.Module, *, optimizer: bool = True) -> dict[str, torch.Tensor]:
    """The buffers and tables as a checkpoint holds them, by name. optimizer: also what the tables' optimizers keep."""
    found = {f"{PREFIX}{name}": buffer for name, buffer in named(model).items()}
    for name, module in model.named_modules():
        if isinstance(module, Table):
            found[f"{TABLE}{name}"] = module.weight
            if optimizer and module.squares is not None:
                found[f"{SQUARES}{name}"] = module.squares
    return found


@torch.no_grad()
def load(
    model: nn.Module, found: dict[str, torch.Tensor], where: str, optimizer: bool = True
) -> dict[str, torch.Tensor]:
    """Takes buffers and tables from the tensors of a checkpoint, and returns the other tensors.

    Args:
        model: whose buffers and tables are filled.
        found: the tensors by name.
        where: the checkpoint, for the sentence of the error.
        optimizer: whether what the tables' optimizers keep is taken too.

    Raises UserError if one is missing, unknown or of another shape, or if it is not finite.
    """
    ours = tensors(model, optimizer=optimizer)
    prefixes = (PREFIX, TABLE, *[SQUARES] * optimizer)
    theirs = {name: x for name, x in found.items() if name.startswith(prefixes)}
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise UserError(f"checkpoint {where} does not fit this model: the {_spoken(odd[0])} is in one of them alone")
    for name, tensor in ours.items():
        if theirs[name].shape != tensor.shape or theirs[name].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"checkpoint {where} does not fit this model: the {_spoken(name)} has another form there")
        if not bool(theirs[name].isfinite().all()):
            raise UserError(f"checkpoint {where} cannot be used: the {_spoken(name)} has numbers that are not finite")
        tensor.copy_(theirs[name])
    return {name: x for name, x in found.items() if not name.startswith((PREFIX, TABLE, SQUARES))}


def _spoken(name: str) -> str:
    """For example, buffer `1.running_mean`."""
    kind, _, rest = name.partition(".")
    return f"{kind} `{rest}`"
