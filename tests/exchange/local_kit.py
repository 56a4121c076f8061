"""Plain references of local steps and their meetings."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from rig import Plain, put
from rig import own_gradient as gradient

from hvdllm.optim.parts import SGD, AdamW

OPTIMS = [
    SGD(lr=0.02, momentum=0.9, clip=1.0, weight_decay=0.1), AdamW(lr=0.01, clip=1.0, weight_decay=0.1),
]  # fmt: skip


def rate(tokens: int) -> float:
    return 1.0 / (1 + tokens / 200)


class Replica(Plain):
    """A group on its own."""

    def __init__(self, optim: Any, group: int, rate: Callable[[int], float]) -> None:
        super().__init__(optim, rate)
        self.group, self.taken = group, 0

    def local(self, base: int, groups: int, open: int) -> int:
        """One step at the rate of base + groups x own tokens since; the examples it took."""
        total, count = gradient(self.x, self.group, self.taken)
        self.tokens = base + groups * (open + count) - count  # `step` adds its own
        self.step(total, count)
        self.taken += 1
        return count


def by_hand(
    optim: Any, groups: int, steps: list[int], lr: float, momentum: float, rate: Callable[[int], float] = rate,
    late: bool = False,
) -> tuple[list[torch.Tensor], list[int]]:  # fmt: skip
    """Anchors after rounds of so many steps each, and the tokens then. late: deltas are applied one round after."""
    replicas = [Replica(optim, group, rate) for group in range(groups)]
    anchor = replicas[0].x
    velocity, tokens, exact, before = torch.zeros_like(anchor), 0, 0, None
    anchors, counts = [], []
    bases = [0] * groups
    for count in steps:
        taken = [0] * groups
        for i, _ in itertools.product(range(groups), range(count)):
            taken[i] += replicas[i].local(bases[i], groups, taken[i])
        delta = sum(n * (anchor - r.x) for n, r in zip(taken, replicas, strict=True)) / sum(taken)
        tokens += sum(taken)
        bases = [tokens] * groups
        now, before = (before, delta) if late else (delta, None)
        if now is not None:
            velocity = momentum * velocity + now
            anchor = anchor - lr * (now + momentum * velocity)
        if late:
            bases = [exact + groups * n for n in taken]
            exact = tokens
        for replica in replicas:
            put(replica.model, anchor)
        anchors.append(anchor)
        counts.append(tokens)
    return anchors, counts
