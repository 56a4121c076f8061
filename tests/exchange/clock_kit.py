"""Runs under the simulated clock: ranks of given speeds, on links of given rates."""

from __future__ import annotations

from typing import Any

import rig

from hvdllm.optim import parts as optims
from hvdllm.world.hub import Links

SGD = optims.SGD(lr=0.02, momentum=0.5, clip=0)


BYTES = sum(p.numel() for p in rig.net().parameters()) * 8


def train(size: int, steps: int, exchange: Any, speeds: Any, *, links: Any = None, **more: Any) -> list[rig.Rig]:
    return rig.train(exchange, size, steps, optim=SGD, links=links or Links(), speeds=speeds, **more)


def slowed(rank: int, by: float = 4.0) -> Any:
    return lambda r: 1.0 / by if r == rank else 1.0


def sums(run: rig.Rig, name: str) -> list[float]:
    return [sum(c) for c in zip(*(getattr(c.before, name) for c in run.commits if c.before), strict=True)]
