"""Outer optimizers: what the mean progress of groups that trained on their own does to the weights they share.

    delta = mean of (anchor - weights), which points uphill like a gradient

Functions on slices, in place; their state is handed in. More in hvdllm/exchange/README.md, `diloco` and `fedavg`.
"""

from __future__ import annotations

from typing import Any

import torch


def nesterov(anchor: torch.Tensor, delta: torch.Tensor, velocity: torch.Tensor, *, lr: float, momentum: float) -> None:
    """torch.optim.SGD with nesterov: u = momentum u + delta; anchor -= lr (delta + momentum u) (DiLoCo, arXiv
    2311.08105). lr 1 without momentum: the mean of the weights."""
    velocity.mul_(momentum).add_(delta)
    anchor.sub_(delta, alpha=lr).sub_(velocity, alpha=lr * momentum)


def adam(
    anchor: torch.Tensor,
    delta: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    tau: float,
) -> None:
    """FedAdam (Reddi et al., 2020, arXiv 2003.00295, algorithm 2): no bias correction; tau in the place of epsilon."""
    m.lerp_(delta, 1 - beta1)
    v.mul_(beta2).addcmul_(delta, delta, value=1 - beta2)
    anchor.addcdiv_(m, v.sqrt().add_(tau), value=-lr)


class Momentum:
    """The outer step of DiLoCo's kind, for exchange/local.py; settings: outer_lr, outer_momentum."""

    settings: Any

    def outer_vectors(self) -> tuple[str, ...]:
        return ("velocity",)

    def outer_rate(self) -> float:
        return float(self.settings.outer_lr)

    def outer_step(self, anchor: torch.Tensor, delta: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        lr, momentum = self.settings.outer_lr, self.settings.outer_momentum
        nesterov(anchor, delta, state["velocity"], lr=lr, momentum=momentum)
