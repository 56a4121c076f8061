"""A sum in the gradients' own dtype: what is decoded is what was sent.

The key `grad.<bucket>` becomes the operation `grad.<bucket>.<parity>`: names are few and fixed, because Horovod
matches and caches by name, and two in turn, because the next sum may be launched before the last is applied.
Gradients that are summed in place may not be touched until the flight has landed.
"""

from __future__ import annotations

import torch

from hvdllm.world.base import Flight, World


class Plain:
    def __init__(self, world: World) -> None:
        self.world = world
        self.parity: dict[str, int] = {}

    def sum(self, x: torch.Tensor, key: str) -> Flight:
        self.parity[key] = 1 - self.parity.get(key, 1)
        return self.world.sum(x, f"{key}.{self.parity[key]}")
