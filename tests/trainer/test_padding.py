"""The map under training: padding stays zero, tied weights stay one, whatever the dtype."""

import pytest
import torch
from torch import nn

from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import ALIGN_BYTES, Flat
from hvdllm.models.gpt import GPT, init_weights
from hvdllm.models.parts import Model
from hvdllm.optim.parts import SGD, AdamW
from hvdllm.optim.update import Update
from hvdllm.world.single import SingleWorld


@pytest.mark.parametrize("settings", [AdamW(weight_decay=0.5), SGD(nesterov=True, weight_decay=0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_leave_the_padding_zero(settings: AdamW | SGD, dtype: torch.dtype) -> None:
    gpt = GPT(Model(layers=1, width=10, heads=2, context=8, tied=True), 64).to(dtype)
    init_weights(gpt, 0)
    flat = Flat(gpt, 3, 2000)
    update, spans = Update(settings, lambda tokens: 1.0), flat.pieces(0, 1)
    update.attach(flat, spans)
    padding = torch.ones_like(flat.x, dtype=torch.bool)
    for place in flat.at.values():
        padding[place] = False
    before, ids = flat.x.clone(), torch.arange(8).reshape(1, 8)
    for t in range(4):
        gpt.loss(ids + t, ids + t + 1).backward()
        assert not flat.g[padding].any()
        pieces, gradients = ([v[a:b] for a, b, _ in spans] for v in (flat.x, flat.g))
        update.step(pieces, gradients, Counts, lambda sums: sums)
        flat.g.zero_()
    assert padding.any() and (flat.x[~padding] != before[~padding]).float().mean() > 0.9
    for vector in (flat.x, *update.vectors.values()):
        assert not vector[padding].any()
    assert gpt.output.data_ptr() == gpt.embed.weight.data_ptr() == flat.x.data_ptr()
    starts = [p.data_ptr() - flat.x.data_ptr() for p in gpt.parameters()]
    assert all(start % ALIGN_BYTES == 0 for start in starts)


class Counts:
    tokens, committed = 8.0, 1


def test_buckets_close_at_the_first_border_past_their_size() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))  # 256 bytes a matrix
    names = [[*bucket.names] for bucket in Flat(model, 1, 300).buckets]
    assert names == [["0.weight", "1.weight"], ["2.weight", "3.weight"], [f"{i}.bias" for i in range(4)]]
    assert len(Flat(model, 1, 1e9).buckets) == 2 and len(Flat(nn.Linear(3, 3, bias=False), 1, 1).buckets) == 1


def test_what_is_frozen_is_not_in_the_map() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [*Flat(model, 1, 1).at] == ["weight"]


def test_names_of_operations_are_few_and_alternate() -> None:
    names: list[str] = []

    class Listens(SingleWorld):
        def sum(self, x: torch.Tensor, name: str) -> None:  # type: ignore[override]
            names.append(name)

    wire = Plain(Listens())
    for _ in range(3):
        for key in ("grad.1", "grad.0"):
            wire.sum(torch.zeros(1), key)
    assert names == ["grad.1.0", "grad.0.0", "grad.1.1", "grad.0.1", "grad.1.0", "grad.0.0"]
