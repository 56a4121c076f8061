"""Text from a model: one token after the other, each drawn from the distribution that the model gives."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from hvdllm.models.gpt import GPT


@torch.no_grad()
def generate(
    model: GPT,
    ids: list[int],
    *,
    tokens: int,
    vocab: int,
    generator: torch.Generator,
    temperature: float = 0.8,
    top_k: int | None = 50,
    stop: int | None = None,
) -> list[int]:
    """Continue `ids` (at least one; the last `context` of them count) by up to `tokens` ids; returns these alone.

    Drawn from softmax(logits / temperature) over the top_k likeliest ids below `vocab`, the real vocabulary, so
    never a padded one; temperature 0 takes the likeliest. Ends before `stop`, if that is drawn. `generator` is a
    CPU one: its state and the weights decide the text. Computes on the model's device, in eval mode (the mode
    it was in comes back); not a collective. No cache of keys and values: each token costs a whole forward.
    """
    if not ids:
        raise ValueError("generate() continues ids: give at least one, the end token where there is no prompt")
    device, context = model.embed.weight.device, model.settings.context
    training = model.training
    model.eval()
    out: list[int] = []
    # A compiled block would be compiled again as the text grows.
    eager = torch.compiler.set_stance("force_eager") if model.settings.compile else nullcontext()
    try:
        with eager:
            while len(out) < tokens:
                window_1T = torch.tensor([(ids + out)[-context:]], device=device)
                logits_V = (model.features(window_1T)[0, -1] @ model.output.T)[:vocab].double().cpu()
                if temperature == 0:
                    token = int(logits_V.argmax())
                else:
                    logits_V /= temperature
                    if top_k is not None and top_k < vocab:
                        logits_V[logits_V < logits_V.topk(top_k).values[-1]] = -torch.inf
                    token = int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))
                if token == stop:
                    break
                out.append(token)
    finally:
        model.train(training)
    return out
