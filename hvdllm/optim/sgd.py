"""SGD with momentum on slices, by torch's fused functional form."""

from __future__ import annotations

from torch.optim.sgd import sgd

from hvdllm.optim.base import Slices
from hvdllm.optim.parts import SGD

VECTORS: tuple[str, ...] = ("m",)  # velocity


def step(settings: SGD, on: Slices) -> None:
    """Makes one step in place.

    g += wd x;  v = mu v + g;  x -= lr (g + mu v if nesterov else v)     (torch.optim.SGD, no dampening)
    """
    sgd(
        on.params,
        on.grads,
        [m if settings.momentum else None for m in on.vectors["m"]],
        fused=True,
        grad_scale=on.scale,
        found_inf=on.found_inf,
        weight_decay=settings.weight_decay if on.decayed else 0.0,
        momentum=settings.momentum,
        lr=on.lr,
        dampening=0.0,
        nesterov=settings.nesterov,
        maximize=False,
    )
