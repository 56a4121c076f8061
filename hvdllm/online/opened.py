"""Opens the log in a run's folder, as one rank sees it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hvdllm.errors import UserError
from hvdllm.online import readers
from hvdllm.online.decider import Decider
from hvdllm.online.log import Log
from hvdllm.online.rounds import Layout, Losses, Plan, Rounds
from hvdllm.online.stream import LogStream
from hvdllm.online.waiting import Pauses, Waiting
from hvdllm.online.windows import LogItems
from hvdllm.paths import path_of
from hvdllm.settings import Config
from hvdllm.task.base import Prepared
from hvdllm.task.causal_lm import CausalLM
from hvdllm.world.base import World, from_first

FOLDER = "log"  # in that of a run


def read_into(stream: LogStream, config: Config, folder: Path, world: World, say: Callable[[str], None]) -> None:
    """Begins to read the source into the log of the run in this folder, which has its tokenizer. Collective.

    Raises UserError on all ranks if it cannot be read by so many readers.
    """
    kind = stream.items.log.dtype
    found = readers.started(config.text, folder / FOLDER, folder / "tokenizer.json", kind, world, say)
    stream.decider.read_by(found)


def opened(
    config: Config, data: Prepared, device: torch.device, world: World, folder: Path, say: Callable[[str], None]
) -> tuple[LogStream, Prepared]:
    """The stream of one rank, and the data with the windows of its log. Collective.

    Args:
        config: the settings.
        data: of a stream of which nothing has arrived yet.
        device: where the tensors go.
        world: the ranks.
        folder: of the run, which all ranks can read.
        say: gets a sentence when the loop has to wait.
    """
    assert isinstance(data.task, CausalLM)
    text, tokenizer, context = config.text, data.task.words, config.model.context
    folder = folder / FOLDER
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
    life = from_first(world, lambda: uuid.uuid4().hex[:12], "stream.life")
    still = text.source == "log"
    log = Log(path_of(str(text.path), "text.path=") if still else folder, np.dtype(tokenizer.dtype))
    if still and not log.refresh():
        raise UserError(f"text.path={text.path}: there is no log of a stream; give RUN/log of a run with text=stream")
    items = LogItems(log, context, tokenizer.token_bytes)
    layout = layout_of(config)
    batch, parts = int(config.batch_tokens // context), int(config.exchange.parts)
    begin = 0 if text.last_tokens is None else max(0, layout.fresh(log.last.tokens) - text.last_tokens // context)
    plan = Plan(
        batch, (world.size - config.exchange.dedicated) * parts, text.replay, text.backlog,
        text.behind_tokens // context, parts, begin,
    )  # fmt: skip
    decider = Decider(
        items, Rounds(folder), layout, plan, rank=world.rank, wait_s=text.wait_s, still=still,
        losses=Losses(folder) if text.replay_by == "loss" else None,
    )  # fmt: skip
    waiting = Waiting(world.asks, Pauses(folder, life, world.rank), world.rank, world.size, world.rest, say)
    stream = LogStream(
        decider, waiting, micro_batch=config.micro_batch, seed=config.seed, rank=world.rank, size=world.size,
        device=device,
    )  # fmt: skip
    return stream, replace(data, train=items, sources=stream.slices(data.task))


def layout_of(config: Config) -> Layout:
    """Where windows lie in the log of a run. Raises UserError if the settings leave no window to train on."""
    layout = Layout(config.model.context, config.text.slice(config), config.text.held(config))
    if not 0 < layout.held < layout.slice:
        raise UserError(f"text.slice_tokens={config.text.slice_tokens} is too small: copy the run's folder again")
    return layout
