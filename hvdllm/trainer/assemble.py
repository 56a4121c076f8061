"""Makes the parts of a training step and joins them in one order, for the trainer, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from hvdllm import registry
from hvdllm.exchange.base import Exchange, Milestones, Wire
from hvdllm.exchange.wire.build import make_wire
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Flat
from hvdllm.optim.update import Update
from hvdllm.settings import Config
from hvdllm.task.base import Items, Task
from hvdllm.task.stream import Stream
from hvdllm.world.base import World, peers


@dataclass(frozen=True)
class Assembly:
    """The parts of a training step, joined.

    Attributes:
        module: what the loop calls; it computes the loss, and calls the hooks of the exchange.
        flat: the map of the model's parameters.
        update: the optimizer's step.
        wire: how sums travel.
        exchange: how ranks exchange gradients or weights, attached to all of these.
    """

    module: nn.Module
    flat: Flat
    update: Update
    wire: Wire
    exchange: Exchange


def assemble(
    config: Config,
    model: nn.Module,
    module: nn.Module,
    world: World,
    factor: Callable[[int], float],
    unlike: bool = False,
) -> Assembly:
    """Makes the exchange, flat map, update and wire that the settings name, and attaches them. Collective.

    Args:
        config: the settings.
        model: whose parameters are trained.
        module: what computes the loss, and calls the model.
        world: the ranks.
        factor: the factor of the peak learning rate at a number of committed tokens (optim/schedule.py).
        unlike: whether the ranks compute on several models of processor.
    """
    exchange = registry.built(registry.of("exchange", config.exchange))(config.exchange, config.batch_tokens)
    exchange.milestones, exchange.unlike = milestones(config), unlike
    flat = Flat(model, world.size, bucket_bytes(config, model), config.exchange.gradients)
    update = Update(config.optim, factor)
    with peers(world):
        wire = build_wire(config, exchange.between(world), flat)
        module = exchange.attach(module, flat, update, wire, world)
    return Assembly(module, flat, update, wire, exchange)


def build_model(task: Task, device: torch.device) -> nn.Module:
    """The task's model, with weights drawn from the seed, on the device where it is to train."""
    return task.build().to(device)


def is_reference(config: Config) -> bool:
    """Whether the exchange is a reference: a library such as DDP or Horovod's optimizer moves the sums for it."""
    return registry.of("exchange", config.exchange).facts.carries in registry.LIBRARIES


def build_wire(config: Config, world: World, flat: Flat) -> Wire:
    """The wire that the settings name. A reference exchange gets a plain one, because it reads only its settings."""
    if is_reference(config):
        return Plain(world, config.wire, flat, config.batch_tokens)
    return make_wire(config.wire, world, flat, config.batch_tokens)


def milestones(config: Config) -> Milestones:
    """The marks that the settings ask for. Acts need all ranks at one mark, while nobody has to wait for logs."""
    acts = (config.eval_every, config.sample_every, config.save_every, config.audit_every, config.publish_every)
    return Milestones(acts, (config.log_every,), config.budget_tokens)


def bucket_bytes(config: Config, model: nn.Module) -> float:
    """The size in bytes of a bucket, which is the gradients that travel together (exchange.bucket_mb)."""
    whole = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    chosen = config.exchange.bucket_mb
    if chosen:
        return float(chosen * 2**20)
    if (fragments := getattr(config.exchange, "fragments", 1)) > 1:  # several buckets each, so that they are equal
        return float(min(25 * 2**20, whole / (4 * fragments)))
    return float(min(25 * 2**20, max(2**20, whole / 8)))


def make_stream(config: Config, items: Items, device: torch.device, world: World) -> Stream:
    """This rank's training batches. Raises UserError if there are fewer items than one global batch takes."""
    return Stream(
        items, batch=items_a_batch(config, items), micro_batch=config.micro_batch, seed=config.seed, rank=world.rank,
        size=world.size, device=device,
    )  # fmt: skip


def items_a_batch(config: Config, items: Items) -> int:
    """How many items a global batch takes: those that count about batch_tokens units, in equal parts if asked for."""
    parts = config.exchange.parts
    return int(max(1, round(config.batch_tokens / items.units / parts))) * int(parts)
