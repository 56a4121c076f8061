"""One of the two loops that `bench step` compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Side:
    """A training loop that goes on by some steps when it is asked to, and is idle otherwise.

    Attributes:
        steps: makes so many steps, and returns the mean loss of a token in each: scalars on the device.
        update: clips the gradients and steps the optimizer, and nothing else.
        close: ends what the side has started.
    """

    steps: Callable[[int], list[torch.Tensor]]
    update: Callable[[], None]
    close: Callable[[], None] = lambda: None
