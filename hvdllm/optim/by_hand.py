"""Adam written out, for the rules that torch's fused form does not have: NAdam, and AdamW with frozen v."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdllm.optim.base import Slices
from hvdllm.optim.parts import Adam

CHUNK = 2**20  # elements of a slice that are stepped at a time, so that temporary tensors stay small

# From the gradient, the old v, the new m and the number of the step to the new v and what replaces m / (1-b1^t).
Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def step(rule: Rule, settings: Adam, on: Slices) -> None:
    """Makes one step in place.

    m = b1 m + (1-b1) g;  v, ahead = rule(g, v, m, t);  x -= lr (wd x + ahead / (sqrt(v / (1-b2^s)) + eps))

    s is the number of steps that v has had: t, or `on.seen` where v stays as it is.
    """
    keep = on.found_inf.bool()
    for t, *whole in zip(on.steps, on.params, on.grads, on.vectors["m"], on.vectors["v"], strict=True):
        t.add_(1 - on.found_inf)
        count = t.to(whole[0].dtype)
        for x, g, m, v in zip(*(vector.split(CHUNK) for vector in whole), strict=True):
            if on.scale is not None:
                g = g / on.scale
            new_m = torch.lerp(m, g, 1 - settings.beta1)
            new_v, ahead = rule(g, v, new_m, count)
            seen = count if on.seen is None else on.seen
            ahead /= (new_v / (1 - settings.beta2**seen)).sqrt_().add_(settings.eps)
            if on.decayed:
                ahead.add_(x, alpha=settings.weight_decay)
            for old, new in ((m, new_m), (v, new_v), (x, x - on.lr * ahead)):
                old.copy_(torch.where(keep, old, new))
