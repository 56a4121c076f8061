"""NAdam with decoupled decay on slices: an Adam that looks ahead along its momentum, for gradients that come late.

With beta1 = .99 it is Nesterov's method for delay, as in the code of Ajanthan et al., 2025, arXiv 2505.01099. On a
quadratic, with gradients one update late, it is stable up to 2.5 to 9 times the rate at which plain descent is. For SGD
the same method is optim=sgd optim.nesterov=true optim.momentum=.99, at the paper's rate times (1 - momentum).
"""

from __future__ import annotations

import torch

from hvdllm.optim import by_hand
from hvdllm.optim.base import Slices
from hvdllm.optim.parts import NAdam

VECTORS: tuple[str, ...] = ("m", "v")  # means of gradients and of their squares


def step(settings: NAdam, on: Slices) -> None:
    """Makes one step in place, by by_hand.py with

    v = b2 v + (1-b2) g²;  ahead = b1 m / (1-b1^(t+1)) + (1-b1) g / (1-b1^t)
    (Dozat, 2016, with a constant momentum; the decay is decoupled).
    """
    b1, b2 = settings.beta1, settings.beta2

    def rule(g: torch.Tensor, v: torch.Tensor, m: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.lerp(v, g * g, 1 - b2), m * (b1 / (1 - b1 ** (t + 1))) + g * ((1 - b1) / (1 - b1**t))

    by_hand.step(rule, settings, on)
