"""What an optimizer is: a module with VECTORS and a function `step`. Each optimizer has a file of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from hvdllm.settings import Chosen


@dataclass(frozen=True)
class Slices:
    """What one call of an optimizer changes in place: slices of the flat vectors, which all decay or all do not.

    Attributes:
        lr: the learning rate of this step.
        decayed: whether these weights decay.
        params, grads: the weights and their gradients; the gradients may be overwritten.
        vectors: the optimizer's own vectors by name, cut like the weights.
        steps: how many steps each slice has had.
        scale: the gradients are divided by it; None if they are divided already.
        found_inf: if it is 1, nothing changes, not even `steps`.
        seen: how many steps the second moments have had, if they stay as they are from here on; None if they learn.
    """

    lr: float
    decayed: bool
    params: list[torch.Tensor]
    grads: list[torch.Tensor]
    vectors: dict[str, list[torch.Tensor]]
    steps: list[torch.Tensor]
    scale: torch.Tensor | None
    found_inf: torch.Tensor
    seen: int | None = None


class Optimizer(Protocol):
    """VECTORS names the vectors that the optimizer keeps, each as long as the weights."""

    VECTORS: tuple[str, ...]

    def step(self, settings: Chosen, on: Slices) -> None:
        """Makes one step. `settings` are those of the class that the optimizer is registered with."""
