"""What lossy wires have in common: they keep what they leave out, and add it to the next sum.

Invariant, whatever the code: sum of all that was decoded + sum over ranks of what they keep = sum of all that came in,
each weighed by `weight` of its round (rate / nominal tokens). So x_0 - sum of weight * G over the rounds is x_T - the
last weight * all residuals, exactly for plain descent; for Adam up to its own normalisation. (Error feedback: 1-bit
SGD, Seide et al., 2014; Karimireddy et al., 2019, arXiv 1901.09847; weighing: EXCHANGES.md, section 7.)

State, in the gradients' dtype: residual, what this rank left out of a bucket; owner, what the owner of a piece left out
of its sum (coded wires only). A residual that is not finite stays so, but so is the sum that it was left from: the run
has stopped with NotFinite before anybody could meet it.

A flight has several stages, so it is walked on the driver thread; what the loop changes meanwhile (committed tokens,
weight) is fixed at the launch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from hvdllm.exchange.base import Spanned
from hvdllm.exchange.wire.plain import Spans, Staged, Work
from hvdllm.world.base import World

Kept = dict[int, torch.Tensor]  # by bucket


@dataclass(frozen=True)
class Launch:
    """What a launch fixes. factor: what a residual is multiplied with to be worth as much as before; 0 where the round
    has no weight: then nothing that is kept is spent on it, and nothing of it is kept."""

    bucket: Any
    name: str
    factor: float
    committed: int


class Feedback(Staged, ABC):
    """spans: what of a bucket arrives here, in order, where that is not all of it."""

    def __init__(self, world: World, settings: Any, flat: Any, nominal: int, spans: Spans | None = None) -> None:
        super().__init__(world)
        self.settings, self.flat, self.nominal = settings, flat, nominal
        self.spans: Spans = spans or (lambda bucket: [bucket.span])
        self.committed, self.weight = 0, 1.0
        self.residual: Kept = {}
        self.owner: Kept = {}
        self.worth: dict[int, float] = {}  # the weight at which a bucket's residuals count as they are

    def begin(self, committed: int, weight: float) -> None:
        self.committed, self.weight = committed, weight

    # ------------------------------------------------------------------ flights
    @abstractmethod
    def summing(self, key: str) -> Work: ...

    @abstractmethod
    def scattering(self, key: str) -> Work: ...

    def launch(self, key: str) -> Launch:
        bucket = self.flat.buckets[int(key.rpartition(".")[2])]
        before = self.worth.get(bucket.index, self.weight)
        factor = 0.0
        if self.weight > 0:
            self.worth[bucket.index] = self.weight
            factor = before / self.weight
        return Launch(bucket, self.name(key), factor, self.committed)

    def spend(self, x: torch.Tensor, launch: Launch) -> torch.Tensor:
        """x and all that was kept for it: a sum that is exact leaves nothing."""
        if launch.factor == 0:
            return x
        index = launch.bucket.index
        if (kept := self.residual.pop(index, None)) is not None:
            x.add_(kept, alpha=launch.factor)
        if (kept := self.owner.pop(index, None)) is not None:
            x.view(self.world.size, -1)[self.world.rank].add_(kept, alpha=launch.factor)
        return x

    # ------------------------------------------------------------------ checkpoint
    def kept(self) -> dict[str, Kept]:
        """Vectors over what arrives here, whose sum over ranks counts; the owner's apart."""
        return {"residual": self.residual}

    def own(self, bucket: Any) -> list[Any]:
        """Spans of this rank's piece of what arrives here."""
        spans = self.spans(bucket)
        size = sum(span.stop - span.start for span in spans) // self.world.size
        first, last = size * self.world.rank, size * (self.world.rank + 1)
        cut, offset = [], 0
        for span in spans:
            start, stop = max(first - offset, 0), min(last - offset, span.stop - span.start)
            if start < stop:
                cut.append(span._replace(start=span.start + start, stop=span.start + stop))
            offset += span.stop - span.start
        return cut

    def state(self) -> tuple[dict[str, Any], dict[str, Spanned], dict[str, torch.Tensor]]:
        summed = {name: self._spanned(kept, self.spans) for name, kept in self.kept().items() if kept}
        if self.owner:
            summed["owner"] = self._spanned(self.owner, self.own)
        return {"worth": {str(index): worth for index, worth in self.worth.items()}}, summed, {}

    def load(self, shared: dict[str, Any], summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        """What the owner's vector holds outside the pieces that this rank owns now (nothing, at the same world size)
        joins its residual."""
        self.worth = {int(index): worth for index, worth in shared["worth"].items()}
        for kept in (*self.kept().values(), self.owner):
            kept.clear()
        for bucket in self.flat.buckets:
            for name, kept in self.kept().items():
                if name in summed:
                    self._keep(kept, bucket, _read(summed[name], self.spans(bucket)))
            if "owner" in summed:
                rest = summed["owner"].clone()
                for span in self.own(bucket):
                    rest[span.start : span.stop] = 0
                self._keep(self.owner, bucket, _read(summed["owner"], self.own(bucket)))
                self._keep(self.residual, bucket, _read(rest, self.spans(bucket)))

    def _spanned(self, kept: Kept, spans: Spans) -> Spanned:
        """As a checkpoint takes it: bucket by bucket."""
        buckets = [bucket for bucket in self.flat.buckets if bucket.index in kept]
        return [s for bucket in buckets for s in spans(bucket)], torch.cat([kept[bucket.index] for bucket in buckets])

    def _keep(self, kept: Kept, bucket: Any, values: torch.Tensor) -> None:
        if values.any():
            values = values.to(self.flat.x.device)
            kept[bucket.index] = kept[bucket.index] + values if bucket.index in kept else values


def of_bucket(kept: Kept, index: int, like: torch.Tensor) -> torch.Tensor:
    """What is kept of a bucket; zeros at first."""
    if index not in kept:
        kept[index] = torch.zeros_like(like)
    return kept[index]


def _read(vector: torch.Tensor, spans: list[Any]) -> torch.Tensor:
    return torch.cat([vector[span.start : span.stop] for span in spans])
