"""A two-tower recommender: the logit of a click is the dot product of what a user's and an item's tower make.

Each side looks its row up in an embedding table and sends it through residual blocks of two linear layers. A bias for
all pairs is added. Source: Yi et al., 2019, "Sampling-bias-corrected neural modeling for large corpus item
recommendations".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdllm.models.gpt import Embedding, Linear, draw
from hvdllm.models.parts import Towers as Settings

Maker = Callable[[int, int], nn.Module]  # makes a table of so many rows and features


class Block(nn.Module):
    """Two linear layers beside a shortcut."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = Linear(width, hidden), Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(F.relu(self.up(x)))
        return y


class Towers(nn.Module):
    """Maps pairs of a user's and an item's row, int64 [B, 2], to logits of a click, [B]. Its weights are not
    initialised.

    Args:
        settings: of the model.
        users, items: rows of the two tables.
        table: makes each of them.
    """

    def __init__(self, settings: Settings, users: int, items: int, table: Maker = Embedding) -> None:
        super().__init__()
        self.users, self.items = table(users, settings.width), table(items, settings.width)
        self.user_tower, self.item_tower = (
            nn.Sequential(*(Block(settings.width, settings.hidden) for _ in range(settings.layers))) for _ in range(2)
        )
        self.bias = nn.Parameter(torch.empty(1))

    def forward(self, pairs: Tensor) -> Tensor:
        user = self.user_tower(self.users(pairs[:, 0]))
        item = self.item_tower(self.items(pairs[:, 1]))
        exact = torch.promote_types(user.dtype, torch.float32)  # autocast's 16 bits are too few for a sum
        logits: Tensor = (user.to(exact) * item.to(exact)).sum(1) + self.bias
        return logits


@torch.no_grad()
def init_weights(model: Towers, seed: int) -> None:
    """Initialises all weights. The logits of the first step have a deviation of about a tenth."""
    fans = {name: p.shape[1] for name, p in model.named_parameters() if p.dim() > 1}

    def deviation(name: str) -> float:
        if name.startswith(("users", "items")):
            return math.sqrt(0.1 / math.sqrt(fans[name]))
        return (math.sqrt(2) if ".up." in name else 0.1) / math.sqrt(fans[name])

    draw(model, seed, deviation)
    model.bias.zero_()


def compile_towers(model: Towers) -> None:
    """Compiles each block in place with torch.compile. The tables stay as they are."""
    for tower in (model.user_tower, model.item_tower):
        for block in tower:
            block.compile()
