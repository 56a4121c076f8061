"""The update: divide the sum by its tokens, clip by the global norm, look up the rate, step the optimizer.

The squared norm is taken at every step, clip or not: it is how a gradient that is not finite is seen. From
that step on the optimizer is masked on the device (its `found_inf`), on every rank alike since the norm is
that of the sum, until the host has read the norm and raises.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from hvdllm import registry
from hvdllm.device import Later
from hvdllm.optim import adamw
from hvdllm.optim.base import Optimizer, Slices
from hvdllm.optim.parts import SGD, AdamW, NAdam

Total = Callable[[torch.Tensor], torch.Tensor]


class Meta(Protocol):
    tokens: float
    committed: int


@dataclass
class Slots:
    """What an optimizer keeps, cut like the pieces: vectors by name, step counts, and the mask (1: bad)."""

    vectors: dict[str, list[torch.Tensor]]
    steps: list[torch.Tensor]
    bad: torch.Tensor

    def clone(self) -> Slots:
        vectors = {name: [v.clone() for v in slices] for name, slices in self.vectors.items()}
        return Slots(vectors, [step.clone() for step in self.steps], self.bad.clone())


class Update:
    """settings: an optimizer's. factor: of the peak rate, by committed tokens."""

    def __init__(self, settings: AdamW | NAdam | SGD, factor: Callable[[int], float]) -> None:
        self.settings, self.factor = settings, factor
        self.optimizer: Optimizer = registry.built(registry.of("optim", settings))
        self.steps = 0
        self.frozen_at: int | None = None  # steps that v has seen, once it stays as it is

    def attach(self, flat: Any, pieces: list[Any]) -> None:
        """pieces: spans of the map that this rank owns. State vectors hold their elements one after the other."""
        x = flat.x
        sizes = [span.stop - span.start for span in pieces]
        self.decayed = [span.decayed for span in pieces]
        self.vectors = {
            name: torch.zeros(sum(sizes), dtype=x.dtype, device=x.device) for name in self.optimizer.VECTORS
        }
        self._own = Slots(
            {name: list(vector.split(sizes)) for name, vector in self.vectors.items()},
            [torch.zeros((), dtype=torch.float32, device=x.device) for _ in pieces],
            torch.zeros((), dtype=torch.float32, device=x.device),
        )

    @property
    def bad(self) -> torch.Tensor:
        """1 once a norm was not finite, else 0; on the device."""
        return self._own.bad

    def rate(self, committed: int) -> float:
        """The learning rate of an update after which so many tokens are committed."""
        return self.settings.lr * self.factor(committed)

    def step(
        self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Meta, total: Total, share: float = 1.0
    ) -> tuple[float, Later]:
        """One optimizer step in place; `grad` is spent. total: sums a small vector over the owners of the pieces.
        share: of the rate that this step takes, where it is less than a whole one.

        Returns the rate (that of meta.committed, this round included) and the norm of the mean gradient before
        clipping, to be read later.
        """
        if self._freezes(meta) and self.frozen_at is None:
            self.frozen_at = self.steps
        norm = self._apply(pieces, grad, meta, total, self._own, share)
        self.steps += 1
        return self.rate(meta.committed), norm

    def fresh(self) -> None:
        """The optimizer begins anew; the mask stays as it is."""
        self.steps, self.frozen_at = 0, None
        for state in (*self.vectors.values(), *self._own.steps):
            state.zero_()

    def peek(
        self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Meta, total: Total
    ) -> list[torch.Tensor]:
        """The pieces after such a step, out of place; no state is touched and `grad` is kept (ACCO's estimate).

        Where the norm is not finite these are the pieces themselves: the step that follows sees the same numbers.
        """
        out = [piece.clone() for piece in pieces]
        self._apply(out, [g.clone() for g in grad], meta, total, self._own.clone())
        return out

    def _apply(
        self,
        pieces: list[torch.Tensor],
        grad: list[torch.Tensor],
        meta: Meta,
        total: Total,
        slots: Slots,
        share: float = 1.0,
    ) -> Later:
        squares = torch.stack([torch.linalg.vector_norm(g) for g in grad]).square().sum()
        norm = total(squares).sqrt() / meta.tokens
        read_later = Later(norm)  # before the optimizer's kernels, so that reading does not wait for them
        slots.bad.logical_or_(~torch.isfinite(norm))
        divisor = torch.full_like(norm, meta.tokens)
        if self.settings.clip:
            divisor *= (norm / self.settings.clip).clamp_(min=1.0)
        scale: torch.Tensor | None = divisor
        if norm.dtype == torch.float64:  # the fused kernels take a float32 scale only
            scale = None
            torch._foreach_div_(grad, divisor)
        step = self.optimizer.step
        if self._freezes(meta):
            step = partial(adamw.frozen, self.steps if self.frozen_at is None else self.frozen_at)
        for decayed in (True, False):
            chosen = [i for i, d in enumerate(self.decayed) if d == decayed]
            if chosen:
                on = Slices(
                    share * self.rate(meta.committed),
                    decayed,
                    [pieces[i] for i in chosen],
                    [grad[i] for i in chosen],
                    {name: [slices[i] for i in chosen] for name, slices in slots.vectors.items()},
                    [slots.steps[i] for i in chosen],
                    scale,
                    slots.bad,
                )
                step(self.settings, on)
        return read_later

    def _freezes(self, meta: Meta) -> bool:
        """Does this step leave v as it is? Only where v has seen a step at all."""
        after = getattr(self.settings, "freeze_tokens", None)
        return after is not None and meta.committed > after and self.steps > 0

    def weights(self) -> AbstractContextManager[None]:
        """The weights to evaluate with: for these optimizers the weights themselves."""
        return nullcontext()

    def state(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Shared values, and the vectors over this rank's pieces."""
        return {"steps": self.steps, "frozen_at": self.frozen_at}, self.vectors

    def load(self, shared: dict[str, Any], vectors: dict[str, torch.Tensor]) -> None:
        # An older version corrected a frozen v as if it had gone on learning: from here on it does not.
        self.steps, self.frozen_at = shared["steps"], shared.get("frozen_at")
        for name, vector in self.vectors.items():
            vector.copy_(vectors[name])
        for step in self._own.steps:
            step.fill_(float(self.steps))
