"""SGD with momentum on slices: torch's fused functional form."""

from __future__ import annotations

import torch
from torch.optim.sgd import sgd

from hvdllm.optim.parts import SGD

VECTORS = ("m",)  # velocity


def step(
    settings: SGD,
    lr: float,
    decayed: bool,
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    vectors: dict[str, list[torch.Tensor]],
    steps: list[torch.Tensor],
    scale: torch.Tensor | None,
    found_inf: torch.Tensor,
) -> None:
    """In place. scale: the gradients are divided by it. found_inf 1: nothing changes.

    g += wd x;  v = mu v + g;  x -= lr (g + mu v if nesterov else v)     (torch.optim.SGD, no dampening)
    """
    sgd(
        params,
        grads,
        [m if settings.momentum else None for m in vectors["m"]],
        fused=True,
        grad_scale=scale,
        found_inf=found_inf,
        weight_decay=settings.weight_decay if decayed else 0.0,
        momentum=settings.momentum,
        lr=lr,
        dampening=0.0,
        nesterov=settings.nesterov,
        maximize=False,
    )
