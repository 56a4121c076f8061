"""Our BERT against transformers' BertForMaskedLM, with the same weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import transformers

from hvdllm.models.bert import Bert, init_weights
from hvdllm.models.parts import Bert as Settings

SETTINGS = Settings(layers=2, width=32, heads=4, context=12, mlp_width=48)
VOCAB = 64


def theirs() -> transformers.BertForMaskedLM:
    config = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=12, hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager", pad_token_id=None,
    )  # fmt: skip
    return transformers.BertForMaskedLM(config).double().eval()


def copied(ours: Bert) -> transformers.BertForMaskedLM:
    """A model of theirs with our weights. Their segments are ours of zeros."""
    model = theirs()
    weights = ours.state_dict()
    with torch.no_grad():
        bert, head = model.bert, model.cls.predictions
        bert.embeddings.word_embeddings.weight.copy_(weights["embed.weight"])
        bert.embeddings.position_embeddings.weight.copy_(weights["positions.weight"])
        bert.embeddings.token_type_embeddings.weight.zero_()
        bert.embeddings.LayerNorm.load_state_dict(ours.embed_norm.state_dict())
        for mine, layer in zip(ours.blocks, bert.encoder.layer, strict=True):
            parts = zip(("query", "key", "value"), mine.qkv.weight.chunk(3), mine.qkv.bias.chunk(3), strict=True)
            for name, weight, bias in parts:
                linear = getattr(layer.attention.self, name)
                linear.weight.copy_(weight)
                linear.bias.copy_(bias)
            layer.attention.output.dense.load_state_dict(mine.out.state_dict())
            layer.attention.output.LayerNorm.load_state_dict(mine.attention_norm.state_dict())
            layer.intermediate.dense.load_state_dict(mine.up.state_dict())
            layer.output.dense.load_state_dict(mine.down.state_dict())
            layer.output.LayerNorm.load_state_dict(mine.mlp_norm.state_dict())
        head.transform.dense.load_state_dict(ours.head.state_dict())
        head.transform.LayerNorm.load_state_dict(ours.head_norm.state_dict())
        head.decoder.bias.copy_(ours.head_bias)
    return model


@pytest.fixture(scope="module")
def ours() -> Bert:
    model = Bert(SETTINGS, VOCAB).double()
    init_weights(model, 3)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():  # or biases would be zero, and a missing one would not show
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCAB, (3, 12), generator=draw)
    targets = torch.full_like(ids, -1)
    for row in range(3):
        places = torch.randperm(12, generator=draw)[:2]
        targets[row, places] = torch.randint(VOCAB, (2,), generator=draw)
    return ids, targets


def test_logits_and_gradients_are_those_of_transformers(ours: Bert) -> None:
    ids, targets = batch()
    model = copied(ours)
    torch.testing.assert_close(ours(ids), model(ids).logits, rtol=1e-10, atol=1e-10)
    logits, wanted = ours.guesses(ids, targets, 2)
    loss = F.cross_entropy(logits, wanted, reduction="sum")
    reference = model(ids, labels=targets.masked_fill(targets < 0, -100)).loss * 6
    torch.testing.assert_close(loss, reference, rtol=1e-10, atol=1e-10)
    mine = torch.autograd.grad(loss, [ours.embed.weight, ours.blocks[0].down.weight, ours.head_bias])
    reference.backward()
    embed, head = model.bert.embeddings.word_embeddings.weight, model.cls.predictions
    down = model.bert.encoder.layer[0].output.dense.weight
    for a, b in zip(mine, (embed.grad, down.grad, head.decoder.bias.grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_every_token_sees_all_others_also_with_norms_first() -> None:
    for first in (False, True):
        model = Bert(Settings(layers=1, width=16, heads=2, context=6, norm_first=first), VOCAB).double()
        init_weights(model, 0)
        ids = torch.arange(6)[None]
        other = ids.clone()
        other[0, 5] = 9
        assert not torch.allclose(model(ids)[0, 0], model(other)[0, 0]), "the last token reaches the first"


def test_checkpointing_changes_nothing(ours: Bert) -> None:
    ids, _ = batch()
    saving = Bert(Settings(layers=2, width=32, heads=4, context=12, mlp_width=48, checkpointing=True), VOCAB).double()
    saving.load_state_dict(ours.state_dict())
    grads = [torch.autograd.grad(m(ids).square().sum(), m.embed.weight)[0] for m in (ours, saving)]
    assert torch.equal(*grads)


def test_impossible_encoders_are_refused() -> None:
    assert "no multiple of model.heads=3" in str(Settings(heads=3).problem())
    assert "model.dropout=1" in str(Settings(dropout=1.0).problem()) and SETTINGS.problem() is None
