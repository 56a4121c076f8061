"""Text that a model goes on with."""

from __future__ import annotations

import torch

from hvdllm.models.generate import generate
from hvdllm.models.gpt import GPT
from hvdllm.settings import Config
from hvdllm.text.shards import Corpus
from hvdllm.text.tokenize import Tokenizer


def sample_run(config: Config, model: GPT, corpus: Corpus, tokens: int) -> str:
    """The prompt and what the model makes of it; the same for the same weights and committed tokens."""
    seed = (config.seed * 1_000_003 + tokens) % 2**63  # what torch takes
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
    """The text as the beginning of a document, and up to `tokens` tokens that the model adds to it."""
    prompt = [tokenizer.end, *tokenizer.encode([text])[0].tolist()]
    out = generate(
        model, prompt, tokens=tokens, vocab=tokenizer.vocab, generator=torch.Generator().manual_seed(seed),
        temperature=temperature, top_k=top_k, stop=tokenizer.end,
    )  # fmt: skip
    return tokenizer.decode([*prompt[1:], *out])
