"""AdamW on slices, by torch's fused functional form. The result is bit-equal however the flat vector is cut."""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw

from hvdllm.optim import by_hand
from hvdllm.optim.base import Slices
from hvdllm.optim.parts import AdamW

VECTORS: tuple[str, ...] = ("m", "v")  # means of gradients and of their squares


def step(settings: AdamW, on: Slices) -> None:
    """Makes one step in place.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g²;  x -= lr (wd x + (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps))
    (Loshchilov and Hutter, 2019, algorithm 2). Where v stays as it is, see `frozen`.
    """
    if on.seen is not None:
        frozen(settings, on)
        return
    adamw(
        on.params,
        on.grads,
        on.vectors["m"],
        on.vectors["v"],
        [],
        on.steps,
        fused=True,
        grad_scale=on.scale,
        found_inf=on.found_inf,
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=on.lr,
        weight_decay=settings.weight_decay if on.decayed else 0.0,
        eps=settings.eps,
        maximize=False,
    )


def frozen(settings: AdamW, on: Slices) -> None:
    """Makes one step in place that leaves v as it is: the second stage of 1-bit Adam.

    The bias correction of v also stays as it is, namely that of the `on.seen` steps that v has had. Source: Tang et
    al., 2021, arXiv 2102.02888.
    """

    def rule(g: torch.Tensor, v: torch.Tensor, m: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return v, m / (1 - settings.beta1**t)

    by_hand.step(rule, settings, on)
