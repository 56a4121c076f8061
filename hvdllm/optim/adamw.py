"""AdamW on slices: torch's fused functional form, bit-equal however the flat vector is cut."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.adamw import adamw

from hvdllm.optim import by_hand
from hvdllm.optim.parts import AdamW

VECTORS = ("m", "v")  # means of gradients and of their squares


def step(
    settings: AdamW,
    lr: float,
    decayed: bool,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    vectors: dict[str, list[torch.Tensor]],
    steps: list[torch.Tensor],
    scale: torch.Tensor | None,
    found_inf: torch.Tensor,
) -> None:
    """In place. scale: the gradients are divided by it. found_inf 1: nothing changes, `steps` included.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g²;  x -= lr (wd x + (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps))
    (Loshchilov and Hutter, 2019, algorithm 2).
    """
    adamw(
        params,
        grads,
        vectors["m"],
        vectors["v"],
        [],
        steps,
        fused=True,
        grad_scale=scale,
        found_inf=found_inf,
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=lr,
        weight_decay=settings.weight_decay if decayed else 0.0,
        eps=settings.eps,
        maximize=False,
    )


def frozen(seen: int, settings: AdamW, *rest: Any) -> None:
    """The same with v left as it is: the second stage of 1-bit Adam (Tang et al., 2021, arXiv 2102.02888). Its bias
    correction stays too, that of the `seen` steps that v has had."""

    def rule(g: torch.Tensor, v: torch.Tensor, m: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return v, m / (1 - settings.beta1**t)

    by_hand.step(rule, settings, *rest, seen=seen)
