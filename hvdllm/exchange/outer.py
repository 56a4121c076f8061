"""Outer optimizers: what the mean progress of groups that trained on their own does to the weights that they share.

    delta = mean of (anchor - weights), which points uphill like a gradient

An outer optimizer works on slices, in place, and its state is handed in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


class Outer(Protocol):
    @property
    def rate(self) -> float:
        """By how much one unit of the mean delta moves the anchor."""

    @property
    def vectors(self) -> Mapping[str, float]:
        """Names of the vectors of its state, and the value that all their elements begin with."""

    def step(self, anchor: torch.Tensor, delta: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """One step of the anchor."""


@dataclass(frozen=True)
class Mean:
    """anchor -= rate delta. With rate 1 the anchor becomes the mean of the weights."""

    rate: float = 1.0

    @property
    def vectors(self) -> Mapping[str, float]:
        return {}

    def step(self, anchor: torch.Tensor, delta: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        anchor.sub_(delta, alpha=self.rate)


@dataclass(frozen=True)
class Nesterov:
    """torch.optim.SGD with nesterov (DiLoCo, arXiv 2311.08105): u = momentum u + delta; anchor -= rate (delta +
    momentum u)."""

    rate: float
    momentum: float

    @property
    def vectors(self) -> Mapping[str, float]:
        return {"velocity": 0.0}

    def step(self, anchor: torch.Tensor, delta: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        velocity = state["velocity"].mul_(self.momentum).add_(delta)
        anchor.sub_(delta, alpha=self.rate).sub_(velocity, alpha=self.rate * self.momentum)


@dataclass(frozen=True)
class FedAdam:
    """FedOpt (Reddi et al., 2020, arXiv 2003.00295, algorithm 2): Adam without bias correction, with tau in the place
    of epsilon; the second moment begins at tau²."""

    rate: float
    beta1: float
    beta2: float
    tau: float

    @property
    def vectors(self) -> Mapping[str, float]:
        return {"m": 0.0, "v": self.tau**2}

    def step(self, anchor: torch.Tensor, delta: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        m = state["m"].lerp_(delta, 1 - self.beta1)
        v = state["v"].mul_(self.beta2).addcmul_(delta, delta, value=1 - self.beta2)
        anchor.addcdiv_(m, v.sqrt().add_(self.tau), value=-self.rate)
