"""NAdam with decoupled decay on slices: Adam that looks ahead along its momentum, for gradients that come late.

With beta1 = .99 it is Nesterov's method for delay (Ajanthan et al., 2025, arXiv 2505.01099, their code): on a
quadratic, delayed by one update, it stays stable at 2.5 to 9 times the rate that plain descent stands. For SGD the
same is optim=sgd optim.nesterov=true optim.momentum=.99, at the paper's rate times (1 - momentum).
"""

from __future__ import annotations

import torch

from hvdllm.config.schema import NAdam

VECTORS = ("m", "v")  # means of gradients and of their squares


def step(
    settings: NAdam,
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

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g²
    x -= lr (wd x + (b1 m / (1-b1^(t+1)) + (1-b1) g / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps))
    (Dozat, 2016, with a constant momentum; the decay is decoupled).
    """
    b1, b2 = settings.beta1, settings.beta2
    keep = found_inf.bool()
    for x, g, m, v, t in zip(params, grads, vectors["m"], vectors["v"], steps, strict=True):
        if scale is not None:
            g = g / scale
        t.add_(1 - found_inf)
        count = t.to(x.dtype)
        new_m = torch.lerp(m, g, 1 - b1)
        new_v = torch.lerp(v, g * g, 1 - b2)
        ahead = new_m * (b1 / (1 - b1 ** (count + 1))) + g * ((1 - b1) / (1 - b1**count))
        ahead /= (new_v / (1 - b2**count)).sqrt_().add_(settings.eps)
        if decayed:
            ahead.add_(x, alpha=settings.weight_decay)
        for old, new in ((m, new_m), (v, new_v), (x, x - lr * ahead)):
            old.copy_(torch.where(keep, old, new))
