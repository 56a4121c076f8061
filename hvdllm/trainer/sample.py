"""Samples text from a model."""

from __future__ import annotations

import torch

from hvdllm.models.generate import generate
from hvdllm.models.gpt import GPT
from hvdllm.settings import Config
from hvdllm.text.shards import Corpus
from hvdllm.text.tokenize import Tokenizer


def sample_run(config: Config, model: GPT, corpus: Corpus, tokens: int) -> str:
    """The prompt of the settings and its continuation. Equal weights and committed tokens give equal text."""
    seed = (config.seed * 1_000_003 + tokens) % 2**63  # the range that torch takes
    return continue_text(model, corpus.tokenizer, config.sample_prompt, tokens=config.sample_tokens, seed=seed)


def continue_text(
    model: GPT,
    tokenizer: Tokenizer,
    text: str,
    *,
    tokens: int,
    seed: int,
    temperature: float = 0.8,
    top_k: int | None = 50,
) -> str:
    """The text, followed by what the model adds to it.

    Args:
        model: the language model.
        tokenizer: of the model.
        text: taken as the beginning of a document.
        tokens: how many the model adds at most; it stops earlier where it ends the document.
        seed: of the random numbers.
        temperature: divides the logits.
        top_k: only this many of the likeliest tokens are drawn from, or all if None.
    """
    prompt = [tokenizer.end, *tokenizer.encode([text])[0].tolist()]
    out = generate(
        model, prompt, tokens=tokens, vocab=tokenizer.vocab, generator=torch.Generator().manual_seed(seed),
        temperature=temperature, top_k=top_k, stop=tokenizer.end,
    )  # fmt: skip
    return tokenizer.decode([*prompt[1:], *out])
