"""The update: divide the sum by its tokens, clip by the global norm, look up the rate, step the optimizer.

The squared norm is taken at every step, clip or not: it is how a gradient that is not finite is seen. From
that step on the optimizer is masked on the device (its `found_inf`), on every rank alike since the norm is
that of the sum, until the host has read the norm and raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

from hvdllm.config.schema import SGD, AdamW
from hvdllm.device import Later
from hvdllm.optim import adamw, sgd

OPTIMIZERS: dict[type, Any] = {AdamW: adamw, SGD: sgd}


class Meta(Protocol):
    tokens: float
    committed: int


class Update:
    """settings: an optimizer's. factor: of the peak rate, by committed tokens."""

    def __init__(self, settings: AdamW | SGD, factor: Callable[[int], float]) -> None:
        self.settings, self.factor = settings, factor
        self.optimizer = OPTIMIZERS[type(settings)]
        self.steps = 0

    def attach(self, flat: Any, pieces: list[Any]) -> None:
        """pieces: spans of the map that this rank owns. State vectors hold their elements one after the other."""
        x = flat.x
        sizes = [span.stop - span.start for span in pieces]
        self.decayed = [span.decayed for span in pieces]
        self.vectors = {
            name: torch.zeros(sum(sizes), dtype=x.dtype, device=x.device) for name in self.optimizer.VECTORS
        }
        self._slices = {name: vector.split(sizes) for name, vector in self.vectors.items()}
        self._steps = [torch.zeros((), dtype=torch.float32, device=x.device) for _ in pieces]
        self.bad = torch.zeros((), dtype=torch.float32, device=x.device)

    def step(
        self,
        pieces: list[torch.Tensor],
        grad: list[torch.Tensor],
        meta: Meta,
        total: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[float, Later]:
        """One optimizer step in place; `grad` is spent. total: sums a small vector over the owners of the pieces.

        Returns the rate (that of meta.committed, this round included) and the norm of the mean gradient before
        clipping, to be read later.
        """
        squares = torch.stack([torch.linalg.vector_norm(g) for g in grad]).square().sum()
        norm = total(squares).sqrt() / meta.tokens
        read_later = Later(norm)  # before the optimizer's kernels, so that reading does not wait for them
        self.bad.logical_or_(~torch.isfinite(norm))
        divisor = torch.full_like(norm, meta.tokens)
        if self.settings.clip:
            divisor *= (norm / self.settings.clip).clamp_(min=1.0)
        scale: torch.Tensor | None = divisor
        if norm.dtype == torch.float64:  # the fused kernels take a float32 scale only
            scale = None
            for g in grad:
                g /= divisor
        lr = self.settings.lr * self.factor(meta.committed)
        for decayed in (True, False):
            chosen = [i for i, d in enumerate(self.decayed) if d == decayed]
            if chosen:
                self.optimizer.step(
                    self.settings,
                    lr,
                    decayed,
                    [pieces[i] for i in chosen],
                    [grad[i] for i in chosen],
                    {name: [slices[i] for i in chosen] for name, slices in self._slices.items()},
                    [self._steps[i] for i in chosen],
                    scale,
                    self.bad,
                )
        self.steps += 1
        return lr, read_later

    def weights(self) -> AbstractContextManager[None]:
        """The weights to evaluate with: for these optimizers the weights themselves."""
        return nullcontext()

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Shared values, and the vectors over this rank's pieces."""
        return {"steps": self.steps}, self.vectors

    def load(self, shared: dict[str, Any], vectors: dict[str, torch.Tensor]) -> None:
        self.steps = shared["steps"]
        for name, vector in self.vectors.items():
            vector.copy_(vectors[name])
        for step in self._steps:
            step.fill_(float(self.steps))
