"""What several exchanges are held to, and the settings that they are held with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rig import NOMINAL, Plain, train
from torch import nn

from hvdllm.exchange.base import NotFinite
from hvdllm.optim.parts import SGD, AdamW, NAdam

OPTIMS = [
    AdamW(lr=0.02, clip=1.0, weight_decay=0.3),
    AdamW(lr=0.02, clip=0.0),
    SGD(lr=0.05, momentum=0.9, clip=0.4, weight_decay=0.1),
    SGD(lr=0.02, momentum=0.8, nesterov=True, clip=0.0),
    NAdam(lr=0.01, clip=0.8),
]


NAMES = ["adamw", "adamw-unclipped", "sgd", "nesterov", "nadam"]


def rate(tokens: int) -> float:
    """Changes from update to update."""
    return 1.0 / (1.0 + tokens / 100)


def equal(rigs: list[Any], expected: list[torch.Tensor]) -> None:
    for rig in rigs:
        assert len(rig.weights) == len(expected)
        for t, (a, b) in enumerate(zip(rig.weights, expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=lambda m, t=t: f"commit {t + 1}: {m}")
        assert all(torch.equal(a, b) for a, b in zip(rig.weights, rigs[0].weights, strict=True)), "replicas differ"


class Point(nn.Module):
    """f = sum over examples |w - t|² / 2: curvature 1 of the mean loss; the minimum moves with the examples."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(3, dtype=torch.float64))


def quadratic(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (model.w - t).square().sum() / 2


def growth(exchange: Any, lr: float, momentum: float = 0.0, nesterov: bool = False) -> float:
    """Largest weight in the last quarter of 400 updates over that in the second quarter."""
    optim = SGD(lr=lr, momentum=momentum, nesterov=nesterov, clip=0.0)
    try:
        (rig,) = train(exchange, 1, 400, optim=optim, model=Point, cost=quadratic, micro=NOMINAL)
    except NotFinite:
        return float("inf")
    sizes = [w.abs().max().item() for w in rig.weights]
    return max(sizes[300:]) / max(sizes[100:200])


PLAIN = SGD(lr=0.05, momentum=0.0, clip=0.0)


def steady(count: int = 4) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """The same number of examples in every step of every group."""
    return lambda group, step: (torch.ones(count, 4).double(), torch.ones(count, 3).double())


def slope(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Gradient 1 an example for every weight, whatever the weights are."""
    return sum((p.sum() for p in model.parameters()), torch.zeros(()).double()) * len(x)


def equals_one_process(exchange: Any, optim: Any, size: int, steps: int = 7) -> None:
    """The same weights at every commit as one process has with the whole batch."""
    plain, expected = Plain(optim, rate), []
    for t in range(steps):
        expected.append(plain.step(plain.gradient(plain.x, t), NOMINAL))
    rigs = train(exchange, size, steps, optim=optim, rate=rate)
    equal(rigs, expected)
    assert [c.tokens for c in rigs[0].commits] == [NOMINAL * (t + 1) for t in range(steps)]
    assert rigs[0].settled.tokens == 0 and torch.equal(rigs[0].final, rigs[0].weights[-1])


def stable_below(exchange: Any, bound: float, momentum: float = 0.0) -> None:
    """And not above. An exchange that is not late, or later than it says, has another bound; data differ from half to
    half, else ACCO's second mode is never seen."""
    assert growth(exchange, 0.9 * bound, momentum) < 1.7 < 5 < growth(exchange, 1.2 * bound, momentum)
