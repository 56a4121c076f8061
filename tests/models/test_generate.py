"""Sampling: only real ids, decided by the generator, greedy at temperature 0, and the model left as it was."""

from __future__ import annotations

import time

import pytest
import torch

from hvdllm.models.generate import generate
from hvdllm.models.gpt import GPT, init_weights
from hvdllm.models.parts import Model

SETTINGS = Model(layers=2, width=32, heads=4, context=16)
REAL, PADDED = 40, 64


@pytest.fixture
def model() -> GPT:
    model = GPT(SETTINGS, PADDED)
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p *= 5 if p.dim() > 1 else 1  # peaked distributions
        model.embed.weight[REAL:] *= 20  # padded ids are far the likeliest: only the mask keeps them out
    return model


def sample(model: GPT, ids: list[int], tokens: int = 30, seed: int = 0, **more: object) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return generate(model, ids, tokens=tokens, vocab=REAL, generator=generator, **more)


def test_padded_ids_are_never_drawn(model: GPT) -> None:
    with torch.no_grad():
        logits_BTV = model(torch.arange(REAL)[None, :16])
    assert (logits_BTV.argmax(-1) >= REAL).any(), "the model would like to say padded ids"
    for temperature in (0.0, 0.8, 50.0):
        for top_k in (None, 5, 1000):
            out = sample(model, [3], tokens=60, temperature=temperature, top_k=top_k)
            assert len(out) == 60 and max(out) < REAL


def test_the_generator_decides_and_nothing_else(model: GPT) -> None:
    torch.manual_seed(1)
    first = sample(model, [1, 2, 3], temperature=2.0)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert sample(model, [1, 2, 3], temperature=2.0) == first
    assert sample(model, [1, 2, 3], temperature=2.0, seed=1) != first
    torch.manual_seed(1)
    sample(model, [1, 2, 3], temperature=2.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_takes_the_likeliest_of_the_last_context(model: GPT) -> None:
    """Also beyond the context, where the oldest tokens fall off, and from a prompt longer than it."""
    ids = [i % REAL for i in range(0, 70, 3)]
    expected = list(ids)
    with torch.no_grad():
        for _ in range(20):
            expected.append(int(model(torch.tensor([expected[-16:]]))[0, -1, :REAL].argmax()))
    out = sample(model, ids, tokens=20, temperature=0)
    assert out == expected[len(ids) :]
    assert len(set(out)) > 1
    assert sample(model, ids, tokens=20, temperature=1.0, top_k=1) == out


def test_draws_follow_the_softmax_at_the_temperature(model: GPT) -> None:
    with torch.no_grad():
        logits_V = model(torch.tensor([[7]]))[0, -1, :REAL].double()
    p_V = (logits_V / 0.4).softmax(-1)
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor(
        [
            generate(model, [7], tokens=1, vocab=REAL, generator=generator, temperature=0.4, top_k=None)
            for _ in range(3000)
        ]
    )
    counted_V = draws.flatten().bincount(minlength=REAL) / len(draws)
    assert p_V.max() < 0.9 and (p_V - logits_V.softmax(-1)).abs().max() > 0.1
    assert (counted_V - p_V).abs().max() < 0.04  # more than four standard deviations


def test_top_k_leaves_only_the_likeliest(model: GPT) -> None:
    with torch.no_grad():
        best = set(model(torch.tensor([[7]]))[0, -1, :REAL].topk(3).indices.tolist())
    drawn = {sample(model, [7], tokens=1, seed=s, temperature=100.0, top_k=3)[0] for s in range(60)}
    assert drawn == best


def test_stop_ends_the_text_and_is_no_part_of_it(model: GPT) -> None:
    whole = sample(model, [1], temperature=2.0)
    stop = whole[10]
    assert sample(model, [1], temperature=2.0, stop=stop) == whole[: whole.index(stop)]


def test_the_mode_comes_back_and_dropout_is_off_meanwhile() -> None:
    settings = Model(layers=1, width=32, heads=4, context=16, dropout=0.5)
    model = GPT(settings, PADDED)
    init_weights(model, 0)
    for mode in (True, False):
        model.train(mode)
        assert sample(model, [1], temperature=0) == sample(model, [1], temperature=0)
        assert model.training is mode and model.blocks[0].training is mode
        assert all(p.grad is None for p in model.parameters())


def test_no_prompt_is_refused(model: GPT) -> None:
    with pytest.raises(ValueError, match="at least one"):
        sample(model, [])


def test_a_sample_of_the_tiny_model_takes_less_than_two_seconds() -> None:
    model = GPT(Model(layers=4, width=128, heads=4, context=128), 2048)
    init_weights(model, 0)
    start = time.process_time()  # this process's own, so that a busy machine fails no test
    generate(model, [1], tokens=160, vocab=2000, generator=torch.Generator())
    assert time.process_time() - start < 2
