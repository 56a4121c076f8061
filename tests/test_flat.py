"""The one map."""

import pytest
import torch
from torch import nn

from hvdllm.flat import ALIGN_BYTES, Flat, TensorPart
from hvdllm.models.gpt import GPT, init_weights
from hvdllm.models.parts import Model


def model() -> GPT:
    gpt = GPT(Model(layers=2, width=20, heads=2, context=8), 64)
    init_weights(gpt, 0)
    return gpt


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_layout(ranks: int) -> None:
    gpt = model()
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    flat = Flat(gpt, ranks, 4000)
    names = [name for bucket in flat.buckets for name in bucket.names]
    matrices = [name for name, p in before.items() if p.dim() >= 2]
    assert names == matrices + [name for name in before if name not in matrices]
    assert len(flat.buckets) > 3 and [b.span.decayed for b in flat.buckets] == [True] * (len(flat.buckets) - 1) + [
        False
    ]
    for name, p in gpt.named_parameters():
        assert torch.equal(p, before[name])
        assert p.data_ptr() == flat.view(name).data_ptr() and (p.data_ptr() - flat.x.data_ptr()) % ALIGN_BYTES == 0
        assert p.grad is not None and p.grad.data_ptr() == flat.view(name, flat.g).data_ptr()
    covered = torch.zeros_like(flat.x)
    for bucket in flat.buckets:
        assert (bucket.span.stop - bucket.span.start) * 4 % (ranks * ALIGN_BYTES) == 0
    for rank in range(ranks):
        spans = flat.pieces(rank, ranks)
        assert ranks == 1 or len(spans) == len(flat.buckets), "a rank owns its slice of every bucket"
        for start, stop, _ in spans:
            covered[start:stop] += 1
    assert torch.equal(covered, torch.ones_like(covered))
    assert len(flat.pieces(0, 1)) == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_cut_into_named_parts_and_pasted_for_another_number_of_ranks(ranks: int) -> None:
    flat, other = Flat(model(), ranks, 4000), Flat(model(), 5, 9000)
    for name in flat.at:
        flat.view(name).copy_(torch.randn(flat.parameters[name].shape))
    parts: list[TensorPart] = []
    for rank in range(ranks):
        spans = flat.pieces(rank, ranks)
        parts += flat.cut(spans, torch.cat([flat.x[span.start : span.stop] for span in spans]))
    assert sum(part.values.numel() for part in parts) == sum(p.numel() for p in flat.parameters.values())
    other.x.zero_()
    other.paste(parts, other.x)
    assert all(torch.equal(other.view(name), flat.view(name)) for name in flat.at)


def test_flip_changes_where_backward_adds() -> None:
    flat = Flat(nn.Linear(3, 2), 1, 100, copies=2)
    first = flat.g
    flat.parameters["weight"].sum().backward()
    flat.flip()
    assert flat.g is not first
    (2 * flat.parameters["weight"].sum()).backward()
    assert first.max() == 1 and flat.g.max() == 2
    flat.flip()
    assert flat.g is first


def test_tied_weights_stay_tied_and_padding_stays_zero() -> None:
    gpt = model()
    flat = Flat(gpt, 3, 4000)
    ids = torch.arange(8).reshape(1, 8)
    gpt.loss(ids, ids + 1).backward()
    assert "head.weight" not in flat.at and gpt.output.data_ptr() == flat.view("embed.weight").data_ptr()
    padding = torch.ones_like(flat.x, dtype=torch.bool)
    for place in flat.at.values():
        padding[place] = False
    assert padding.any() and not flat.g[padding].any() and not flat.x[padding].any()
