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
    """Continues `ids`, and returns only the new ids.

    Each token is drawn from softmax(logits / temperature) over the likeliest ids. The weights and the state of the
    generator decide the text. It is computed on the model's device in eval mode; the model's mode is restored at the
    end. No keys and values are cached, so each token costs a whole forward pass. This is no collective.

    Args:
        model: the transformer.
        ids: the prompt, at least one id; the last `context` of them count.
        tokens: how many ids are added at most.
        vocab: the size of the real vocabulary, so that no padded id is drawn.
        generator: a generator on the CPU.
        temperature: 0 takes the likeliest id.
        top_k: how many of the likeliest ids are drawn from; None for all.
        stop: an id at which the text ends; it is not part of the result.

    Raises ValueError if `ids` is empty.
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
