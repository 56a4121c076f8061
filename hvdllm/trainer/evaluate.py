"""Validation loss over a fixed prefix of the validation windows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from hvdllm.models.gpt import GPT
from hvdllm.settings import Config
from hvdllm.text.shards import Corpus
from hvdllm.text.stream import validation
from hvdllm.trainer.backward import autocast
from hvdllm.world.base import World


@dataclass(frozen=True)
class Evaluation:
    """loss: nats a token. bits_per_byte: of the text that those tokens stand for."""

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    token_bytes: np.ndarray,
    precision: str,
    device: torch.device,
    world: World,
) -> Evaluation:
    """batches: this rank's (inputs, targets), each [B, T]. token_bytes [vocab]: bytes of text a token stands for.

    The sums over all ranks, in float64, divided once. Collective. Leaves the model in training mode as found.
    """
    was = model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    table = torch.as_tensor(token_bytes.astype(np.float64))
    loss = torch.zeros((), dtype=torch.float64, device=device)
    for inputs, targets in batches:
        with autocast(precision, device):
            loss += model.loss(inputs, targets)  # type: ignore[operator]
        sums[1] += targets.numel()
        sums[2] += table[targets.cpu()].sum()
    sums[0] = loss
    model.train(was)
    total, tokens, size = world.sum(sums, "act.evaluate").land().tolist()
    return Evaluation(total / tokens, total / np.log(2) / max(size, 1.0), int(tokens))


def evaluate_run(config: Config, model: GPT, corpus: Corpus, device: torch.device, world: World) -> Evaluation:
    """The validation loss of these weights, as every evaluation of a run defines it. Collective."""
    batches = validation(
        corpus.validation, context=config.model.context, eval_tokens=config.eval_tokens,
        micro_batch=config.micro_batch, rank=world.rank, size=world.size, device=device,
    )  # fmt: skip
    return evaluate(model, batches, text_bytes(corpus), config.precision, device, world)


def text_bytes(corpus: Corpus) -> np.ndarray:
    """Bytes of the text that each token stands for; where the tokenizer loses some, or they are known roughly, scaled:
    over the validation text they add up to its own."""
    shard = corpus.validation_shard
    return corpus.tokenizer.token_bytes * (shard.bytes / shard.spelled if shard.spelled else 1.0)
