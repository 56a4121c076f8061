"""A run, which is its parts, made from a checked configuration in one visible order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from hvdllm.checkpoint import read
from hvdllm.errors import UserError
from hvdllm.lock import Lock
from hvdllm.online.opened import opened
from hvdllm.online.stream import LogStream
from hvdllm.optim.schedule import Factor, factor
from hvdllm.plain import Json
from hvdllm.runs import Folder
from hvdllm.settings import Config
from hvdllm.task.base import Kind, Prepared
from hvdllm.task.stream import Stream
from hvdllm.trainer import account, frozen
from hvdllm.trainer.agree import agree_on_weights, agreed_data, agreed_device, agreed_room
from hvdllm.trainer.assemble import Assembly, assemble, build_model, make_stream
from hvdllm.trainer.backward import Loss
from hvdllm.trainer.clock import Clock
from hvdllm.trainer.ledger import Ledger
from hvdllm.trainer.resume import Start
from hvdllm.trainer.show import Show
from hvdllm.trainer.trunk import Trunk, begin, look
from hvdllm.world.base import World, from_first

Saved = Json  # the plain values of a checkpoint


@dataclass(frozen=True)
class Origin:
    """What a life of a run begins with.

    Attributes:
        horizon: the number of tokens over which the schedule runs.
        resumed: the plain values of the checkpoint that this life goes on from, or None if the run begins.
        trunk: the weights that the run began with, or None if it drew its own.
    """

    horizon: int
    resumed: Saved | None
    trunk: Trunk | None


@dataclass(frozen=True)
class Run:
    """One life of a run, as one rank sees it. The fields without a line here are named after their types.

    Attributes:
        start: how this life of the run starts.
        hosts: the host, device and number of threads of each rank.
        loss: the module that the exchange was given.
        parts: exchange, update, wire and flat map, joined.
        rate: the factor of the peak learning rate.
        folder: of the run, or None on ranks other than 0.
        origin: what this life begins with.
    """

    config: Config
    world: World
    show: Show
    start: Start
    device: torch.device
    hosts: list[Json]
    data: Prepared
    model: nn.Module
    loss: Loss
    parts: Assembly
    rate: Factor
    stream: Stream | LogStream
    folder: Folder | None
    clock: Clock
    ledger: Ledger
    origin: Origin


def make(config: Config, world: World, show: Show, start: Start, lock: Lock | None, kind: Kind) -> Run:
    """Makes the parts of a run in the order in which they need each other. Collective.

    The weights are those drawn from the seed, or those of the trunk. A checkpoint is loaded later (life.py).

    Args:
        config: the checked settings.
        world: the ranks.
        show: what the user sees.
        start: how this life of the run starts.
        lock: of the run's folder, on rank 0.
        kind: the functions of the task.

    Raises UserError on every rank if the ranks do not agree on device, text or weights, or if the model does not fit.
    """
    device = agreed_device(config, world, show.say)
    agreed_room(config, kind.rough(config), device, world)  # before the data are prepared, which may take hours
    if start.checkpoint is None:
        look(config, world)
    data = agreed_data(config, kind, start, world, show)
    agreed_room(config, data.task, device, world)
    model = build_model(data.task, device)
    checkpoint = Path(start.checkpoint) if start.checkpoint else None
    resumed: Saved | None = from_first(world, lambda: read.read_run(checkpoint), "load.state") if checkpoint else None
    horizon = int(resumed["horizon"]) if resumed else config.schedule.horizon or config.budget_tokens
    if data.data_hash != (resumed["data_hash"] if resumed else start.data_hash or data.data_hash):
        raise UserError(
            f"the data are not those that {start.folder} was trained on: give them back, or choose another name"
        )
    loss = Loss(
        data.task, model, precision=config.precision, device=device, seed=config.seed, rank=world.rank,
        dropout=getattr(config.model, "dropout", 0) > 0,
    )  # fmt: skip
    hosts = account.hosts(device, world)
    unlike = len({rank["device"] for rank in hosts}) > 1
    rate = factor(config.schedule, horizon, config.batch_tokens)
    parts = assemble(config, model, loss, world, rate, unlike)
    trunk = None
    if config.init_from is not None and resumed is None:
        trunk = begin(config, data.task.files, parts.exchange, parts.flat, model, world, show.say)
    if resumed is not None and frozen.named(model):
        frozen.share(model, lambda: frozen.load(Path(start.folder), model), world)
    agree_on_weights(parts.flat, world, frozen.named(model).values())
    stream: Stream | LogStream
    if config.text.endless:
        stream, data = opened(config, data, device, world, Path(start.folder), show.say)
    else:
        stream = make_stream(config, data.train, device, world)
    folder = Folder(Path(start.folder), lock) if world.rank == 0 else None
    clock = Clock(world, resumed["seconds"] if resumed else 0.0)
    ledger = Ledger(folder, world, clock, show, config.text.window_tokens if config.text.endless else 0)
    return Run(
        config, world, show, start, device, hosts, data, model, loss, parts, rate, stream, folder, clock, ledger,
        Origin(horizon, resumed, trunk),
    )  # fmt: skip
