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
    """The result of an evaluation.

    Attributes:
        loss: mean loss in nats per token.
        bits_per_byte: the same loss in bits per byte of the text that the tokens stand for.
        tokens: how many tokens were evaluated.
    """

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
    """The mean loss over the batches of all ranks. Collective.

    Sums are taken in float64 over all ranks, and divided once. The model is left in the mode in which it was found.

    Args:
        model: the language model.
        batches: this rank's (inputs, targets), each int64 [B, T].
        token_bytes: bytes of text that each token stands for, [vocab].
        precision: as `autocast` takes it.
        device: where the model lies.
        world: the ranks.
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
    """The validation loss of the model, as a run with these settings defines it. Collective."""
    batches = validation(
        corpus.validation, context=config.model.context, eval_tokens=config.eval_tokens,
        micro_batch=config.micro_batch, rank=world.rank, size=world.size, device=device,
    )  # fmt: skip
    return evaluate(model, batches, text_bytes(corpus), config.precision, device, world)


def text_bytes(corpus: Corpus) -> np.ndarray:
    """The bytes of text that each token stands for, [vocab].

    If the tokenizer loses some bytes, or if its counts are estimates, they are scaled so that over the validation text
    they add up to the size of that text.
    """
    shard = corpus.validation_shard
    return corpus.tokenizer.token_bytes * (shard.bytes / shard.spelled if shard.spelled else 1.0)
