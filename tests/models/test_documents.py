"""model.documents: a window of several documents equals its documents, each alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hvdllm.models.gpt import GPT, init_weights, places
from hvdllm.models.parts import Model
from hvdllm.task.causal_lm import CausalLM
from hvdllm.text.tokenize import BYTES, Tokenizer

GPT2 = dict(layers=2, width=32, heads=4, context=24)
LLAMA = dict(GPT2, kv_heads=2, positions="rope", norm="rmsnorm", mlp="swiglu", bias=False, tied=False)
BOTH = pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
END, VOCAB = 63, 64
BORDERS = [[0, 5, 6, 17, 24], [0, 9, 24]]  # where the documents of two windows begin; one holds its end token alone


def build(shape: dict, **more: object) -> GPT:
    model = GPT(Model(**{**shape, "documents": True, **more}), VOCAB, END).double()
    init_weights(model, seed=0)
    with torch.no_grad():
        for p in model.parameters():
            p *= 5 if p.dim() > 1 else 1
    return model


def windows() -> tuple[Tensor, Tensor]:
    """Inputs and targets; the first document of a window is the rest of one, without its end token."""
    ids = torch.randint(END, (2, 25), generator=torch.Generator().manual_seed(1))
    for row, borders in enumerate(BORDERS):
        ids[row, borders[1:-1]] = END
    return ids[:, :-1], ids[:, 1:]


@BOTH
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_equal_unpacked_ones(shape: dict, checkpointing: bool) -> None:
    """Logits, the loss and every gradient, in fp64. A model without end tokens trains on the documents one by one."""
    packed, alone = build(shape, checkpointing=checkpointing), build(shape, documents=False)
    inputs, targets = windows()
    logits, loss = packed(inputs), packed.loss(inputs, targets)
    loss.backward()
    total = torch.zeros((), dtype=torch.float64)
    for row, borders in enumerate(BORDERS):
        for first, stop in itertools.pairwise(borders):
            one = slice(row, row + 1), slice(first, stop)
            torch.testing.assert_close(logits[one], alone(inputs[one]), rtol=1e-10, atol=1e-12)
            part = alone.loss(inputs[one], targets[one])
            part.backward()
            total += part.detach()
    torch.testing.assert_close(loss.detach(), total, rtol=1e-12, atol=0)
    for mine, theirs in zip(packed.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-11)


@BOTH
def test_without_an_end_token_nothing_changes(shape: dict) -> None:
    inputs = torch.randint(END, (2, 24), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(build(shape)(inputs), build(shape, documents=False)(inputs), rtol=1e-12, atol=1e-12)


def test_places_begin_anew_at_each_end_token() -> None:
    begins = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]], dtype=torch.bool)
    assert places(begins).tolist() == [[0, 1, 0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 0]]


def test_the_task_gives_the_model_its_end_token() -> None:
    from hvdllm.config.compose import compose

    words = ["model.layers=1", "model.width=16", "model.heads=2"]
    for more, end in ((["model.documents=true"], 256), ([], None)):
        model = CausalLM(compose([*words, *more]), 257, Tokenizer(BYTES)).build()
        assert model.end == end
