"""The two towers: what a logit is made of, and how large the model is."""

from __future__ import annotations

import torch

from hvdllm.models import parts
from hvdllm.models.towers import Towers, init_weights


def made(**settings: int) -> Towers:
    model = Towers(parts.Towers(width=6, mlp_width=10, **settings), 64, 128)
    init_weights(model, 3)
    return model


def test_a_logit_is_the_dot_product_of_what_the_towers_make() -> None:
    model = made(layers=2)
    pairs = torch.tensor([[3, 100], [63, 0], [3, 7]])
    logits = model(pairs)
    for k, (user, item) in enumerate(pairs.tolist()):
        sides = []
        for x, tower in ((model.users.weight[user], model.user_tower), (model.items.weight[item], model.item_tower)):
            for block in tower:
                hidden = (block.up.weight @ x + block.up.bias).clamp(min=0)
                x = x + block.down.weight @ hidden + block.down.bias
            sides.append(x)
        torch.testing.assert_close(logits[k], sides[0] @ sides[1] + model.bias[0])


def test_without_layers_it_is_plain_factors_and_weights_are_a_function_of_the_seed() -> None:
    model = made(layers=0)
    assert sum(p.numel() for p in model.parameters()) == (64 + 128) * 6 + 1
    expected = (model.users.weight[5] * model.items.weight[9]).sum()
    torch.testing.assert_close(model(torch.tensor([[5, 9]]))[0], expected)
    again, other = made(layers=0), Towers(parts.Towers(width=6, layers=0), 64, 128)
    init_weights(other, 4)
    assert torch.equal(model.users.weight, again.users.weight)
    assert not torch.equal(model.users.weight, other.users.weight)
    everything = torch.cartesian_prod(torch.arange(64), torch.arange(128))
    assert 0.02 < made(layers=1)(everything).std() < 0.5, "begins near the same chance for all"
