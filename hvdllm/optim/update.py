"""The update divides a sum of gradients by its tokens, clips it, looks up the learning rate and steps the optimizer.

The squared norm is computed at every step, whether gradients are clipped or not, because it shows a gradient that is
not finite. From that step on the optimizer is masked on the device (its `found_inf`) until the host has read the norm
and raises. All ranks do the same, because the norm is that of the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch

from hvdllm import pulse, registry
from hvdllm.device import Later
from hvdllm.flat import Flat, Span
from hvdllm.optim.base import Optimizer, Slices
from hvdllm.optim.parts import OptimizerSettings
from hvdllm.plain import Json
from hvdllm.tables import RowSums

Total = Callable[[torch.Tensor], torch.Tensor]


class Meta(Protocol):
    """What an update needs to know of a round: its tokens, and the tokens that are committed with it."""

    tokens: float
    committed: int


@dataclass
class Slots:
    """What an optimizer keeps, cut like the pieces: vectors by name, counts of steps, and the mask.

    The mask `bad` is 1 once a norm was not finite.
    """

    vectors: dict[str, list[torch.Tensor]]
    steps: list[torch.Tensor]
    bad: torch.Tensor

    def clone(self) -> Slots:
        vectors = {name: [v.clone() for v in slices] for name, slices in self.vectors.items()}
        return Slots(vectors, [step.clone() for step in self.steps], self.bad.clone())


class Update:
    """An optimizer with its clipping and its schedule.

    `factor` gives the share of the peak learning rate as a function of committed tokens.
    """

    def __init__(self, settings: OptimizerSettings, factor: Callable[[int], float]) -> None:
        self.settings, self.factor = settings, factor
        self.optimizer: Optimizer = registry.built(registry.of("optim", settings))
        self.steps = 0
        self.frozen_at: int | None = None  # how many steps v has had when it was frozen

    def attach(self, flat: Flat, pieces: list[Span]) -> None:
        """Makes the vectors of the optimizer for the pieces that this rank owns, which are spans of the map.

        A vector holds the elements of all pieces, one piece after the other.
        """
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
        """A scalar on the device: 1 once a norm was not finite, else 0."""
        return self._own.bad

    def rate(self, committed: int) -> float:
        """The learning rate of the update with which `committed` tokens are committed."""
        return self.settings.lr * self.factor(committed)

    def step(
        self,
        pieces: list[torch.Tensor],
        grad: list[torch.Tensor],
        meta: Meta,
        total: Total,
        share: float = 1.0,
        rows: Sequence[RowSums] = (),
    ) -> tuple[float, Later]:
        """Makes one step of the optimizer in place.

        Args:
            pieces: the weights that this rank owns, one slice for each piece.
            grad: the sums of their gradients; they may be overwritten.
            meta: of the round.
            total: sums a small vector over the owners of all pieces.
            share: of the learning rate that this step takes, if it is less than a whole step.
            rows: summed gradients of rows of tables, which every rank has in whole. They enter the norm.

        Returns the learning rate, and the norm of the mean gradient before clipping, which can be read later.
        """
        pulse.enter("update")
        if self._freezes(meta) and self.frozen_at is None:
            self.frozen_at = self.steps
        norm = self._apply(pieces, grad, meta, total, self._own, share, rows)
        self.steps += 1
        pulse.enter("exchange")
        return self.rate(meta.committed), norm

    def fresh(self) -> None:
        """Lets the optimizer begin anew. The mask stays as it is."""
        self.steps, self.frozen_at = 0, None
        for state in (*self.vectors.values(), *self._own.steps):
            state.zero_()

    def peek(
        self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Meta, total: Total
    ) -> list[torch.Tensor]:
        """The pieces as they would be after such a step (ACCO's estimate).

        Neither the pieces nor the state nor `grad` are changed. If the norm is not finite, the result equals the
        pieces, and the step that follows sees the same numbers.
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
        rows: Sequence[RowSums] = (),
    ) -> Later:
        gradients = [*grad, *(each.values for each in rows)]
        squares = torch.stack([torch.linalg.vector_norm(g) for g in gradients]).square().sum()
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
        seen = None
        if self._freezes(meta):
            seen = self.steps if self.frozen_at is None else self.frozen_at
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
                    seen,
                )
                self.optimizer.step(self.settings, on)
        for each in rows:
            each.table.step(each, divisor, share * self.factor(meta.committed), slots.bad)
        return read_later

    def _freezes(self, meta: Meta) -> bool:
        """Whether this step leaves v as it is. It does so only if v has had a step before."""
        after = getattr(self.settings, "freeze_tokens", None)
        return after is not None and meta.committed > after and self.steps > 0

    def weights(self) -> AbstractContextManager[None]:
        """Within it, the weights are those to evaluate with. For these optimizers they are the weights themselves."""
        return nullcontext()

    def state(self) -> tuple[Json, dict[str, torch.Tensor]]:
        """Values that all ranks share, and the vectors over the pieces of this rank."""
        return {"steps": self.steps, "frozen_at": self.frozen_at}, self.vectors

    def load(self, shared: Json, vectors: dict[str, torch.Tensor]) -> None:
        # An older version corrected a frozen v as if it had gone on learning: from here on it does not.
        self.steps, self.frozen_at = shared["steps"], shared.get("frozen_at")
        for name, vector in self.vectors.items():
            vector.copy_(vectors[name])
        for step in self._own.steps:
            step.fill_(float(self.steps))
