"""Opens the log in a run's folder, as one rank sees it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from hvdllm.online.log import Log
from hvdllm.online.rounds import Layout, Plan, Rounds
from hvdllm.online.stream import LogItems, LogStream, Pauses
from hvdllm.settings import Config
from hvdllm.task.base import Prepared
from hvdllm.task.causal_lm import CausalLM
from hvdllm.world.base import World, from_first

FOLDER = "log"  # in that of a run


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
    items = LogItems(Log(folder, np.dtype(tokenizer.dtype)), context, tokenizer.token_bytes)
    layout = Layout(context, text.slice(config), text.held(config))
    batch, parts = int(config.batch_tokens // context), int(config.exchange.parts)
    plan = Plan(
        batch, (world.size - config.exchange.dedicated) * parts, text.replay, text.backlog,
        text.behind_tokens // context, parts,
    )  # fmt: skip
    stream = LogStream(
        items, Rounds(folder), layout, plan, micro_batch=config.micro_batch, seed=config.seed, rank=world.rank,
        size=world.size, device=device, wait_s=text.wait_s, asks=world.asks, pauses=Pauses(folder, life, world.rank),
        rest=world.rest, say=say,
    )  # fmt: skip
    return stream, replace(data, train=items)
