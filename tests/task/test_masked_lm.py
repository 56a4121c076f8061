"""Masking is BERT's and a pure function of position, and masked targets alone count."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hvdllm.config.check import check
from hvdllm.config.compose import compose
from hvdllm.errors import UserError
from hvdllm.models.bert import Bert
from hvdllm.task.masked_lm import Masked, MaskedLM
from hvdllm.text.windows import Windows
from hvdllm.world.detect import Place

VOCAB = 100
TINY = ("task=masked_lm", "model.layers=1", "model.width=16", "model.heads=2", "model.context=40")


def masked(seed: int = 0, count: int = 6) -> Masked:
    tokens = np.random.RandomState(0).randint(VOCAB, size=401).astype(np.uint16)
    return Masked(Windows(tokens, 40), seed, count, VOCAB)


def test_masks_are_bert_s() -> None:
    """Over many visits: 80 % mask tokens, 10 % random ones, 10 % as they were; only those have targets."""
    items, kinds = masked(count=10), np.zeros(3)
    whole = items.windows.take(np.arange(10), None)[0]
    for epoch in range(60):
        inputs, targets, units = items.take(np.arange(10), np.full(10, epoch))
        there = targets >= 0
        assert (there.sum(1) == 10).all() and (units == 10).all()
        assert torch.equal(targets[there], whole[there]) and torch.equal(inputs[~there], whole[~there])
        hidden, same = inputs[there] == VOCAB, inputs[there] == whole[there]
        kinds += [int(hidden.sum()), int((~hidden & ~same).sum()), int(same.sum())]
    shares = kinds / kinds.sum()
    assert shares == pytest.approx([0.8, 0.099, 0.101], abs=0.015)  # a random token is the same once in a hundred


def test_a_mask_is_a_function_of_seed_window_and_epoch_alone() -> None:
    rows, epochs = np.array([3, 1, 3]), np.array([0, 0, 1])
    a = masked().take(rows, epochs)
    b = masked().take(rows[::-1], epochs[::-1])
    assert torch.equal(a[0], b[0].flip(0)) and torch.equal(a[1], b[1].flip(0))
    assert not torch.equal(a[1][0], a[1][2]), "another epoch, another mask"
    assert not torch.equal(a[1], masked(seed=1).take(rows, epochs)[1])
    assert torch.equal(masked().take(rows, None)[0], masked().take(rows, None)[0])


def task() -> MaskedLM:
    return MaskedLM(compose(list(TINY)), VOCAB)


def test_loss_and_measure_count_the_masked_tokens() -> None:
    one = task()
    model = one.build()
    inputs, targets, units = masked(count=one.count).take(np.arange(4), None)
    logits = model(inputs)
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    torch.testing.assert_close(one.loss(model, inputs, targets), plain)
    sums = one.measure(model, inputs, targets).tolist()
    right = int((logits.argmax(2) == targets)[targets >= 0].sum())
    assert sums == pytest.approx([plain.item(), units.sum(), right])
    assert one.metrics([6.0, 3.0, 2.0]) == {"loss": 2.0, "accuracy": 2 / 3}


def test_sizes_are_those_of_the_model() -> None:
    for words in ((), ("model.norm_first=true", "model.layers=3")):
        one = MaskedLM(compose([*TINY, *words]), VOCAB)
        model = one.build()
        assert one.parameters == sum(p.numel() for p in model.parameters())
        assert isinstance(model, Bert) and len(model.embed.weight) >= VOCAB + 1, "the mask token has a row"


def test_the_words_choose_the_model_and_another_is_refused() -> None:
    assert compose(["task=masked_lm"]).model.norm_first is False
    with pytest.raises(UserError, match="task=masked_lm trains model=bert"):
        check(compose(["task=masked_lm", "model=tiny"]), Place())
    with pytest.raises(UserError, match=r"24 tokens is|fewer than the 1 rank|batch_tokens=5 is 0 sequences"):
        check(compose([*TINY, "batch_tokens=5"]), Place())


def test_the_prompt_is_guessed_token_by_token(tmp_path: Path) -> None:
    from types import SimpleNamespace
    from typing import Any

    words: Any = SimpleNamespace(
        mask=None, encode=lambda texts: [np.array([1, 2, 3])], decode=lambda ids: " ".join(str(i) for i in ids)
    )
    one = MaskedLM(compose(list(TINY)), VOCAB, words)
    said = one.sample(one.build(), 0)
    assert said.startswith("'1 2 3' is guessed as '") and len(said.split("'")[3].split()) == 3
