"""What an optimizer is: a module with VECTORS and `step`, one file each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch


@dataclass(frozen=True)
class Slices:
    """What one call of an optimizer changes, in place: slices of the flat vectors that all decay, or all do not.

    lr: of this step.
    decayed: do these weights decay?
    params, grads: the weights and their gradients; gradients are spent.
    vectors: the optimizer's own, by name, cut like the weights.
    steps: of each slice, how many steps it has had.
    scale: the gradients are divided by it; None: they are divided already.
    found_inf: where it is 1 nothing changes, `steps` included.
    """

    lr: float
    decayed: bool
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    vectors: dict[str, list[torch.Tensor]]
    steps: list[torch.Tensor]
    scale: torch.Tensor | None
    found_inf: torch.Tensor


class Optimizer(Protocol):
    """VECTORS: names of the vectors that it keeps, each as long as the weights."""

    VECTORS: tuple[str, ...]

    def step(self, settings: Any, on: Slices) -> None:
        """One step. settings: those that the optimizer is registered with."""
