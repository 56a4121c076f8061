"""What lossy wires have in common: they keep what they leave out, and add it to the next sum.

Invariant, whatever the code: the sum of all that was decoded and of what all ranks keep is the sum of all that came in,
where each round counts by its `weight` (rate / nominal tokens). So x_0 - the sum of weight * G over the rounds is x_T -
the last weight * all residuals. This is exact for plain descent, and holds for Adam up to its own normalisation. (Error
feedback: 1-bit SGD, Seide et al., 2014; Karimireddy et al., 2019, arXiv 1901.09847.)

Bound: a weight counts for at least a tenth of the largest one so far. When a schedule falls to nothing, what is kept
would otherwise be multiplied by the old over the new rate without end, and the decoded sum, which clipping and
`grad_norm` see, would consist of old residuals. Below that tenth a residual counts as it is, so the invariant holds for
plain descent at the bounded weight.

State, in the gradients' dtype:
    residual  what this rank has left out of a bucket
    owner     what the owner of a piece has left out of its sum (coded wires only)
A residual that is not finite stays so, but the sum that it was left from was not finite either: the run has stopped
with NotFinite before anybody could use it.

A flight has several stages, so it is walked on the driver thread. What the loop changes meanwhile (committed tokens,
weight) is fixed at the launch.

More in hvdllm/exchange/wire/README.md, "Error feedback".
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from hvdllm.exchange.base import Spanned, Values
from hvdllm.exchange.wire.plain import Spans, Staged, W, Work
from hvdllm.flat import Bucket, Flat, Span
from hvdllm.world.base import World

LEAST = 0.1  # of the largest weight so far: none counts for less

Kept = dict[int, torch.Tensor]  # by bucket


@dataclass(frozen=True)
class Launched:
    """What a launch fixes.

    factor: a residual is multiplied by it, so that it moves the weights as far as it would have done before. It is 0
      where the round has no weight: such a round neither uses up a residual nor leaves one
    """

    bucket: Bucket
    name: str
    factor: float
    committed: int


class Feedback(Staged[W], ABC):
    """spans: what of a bucket arrives here, in order, where this is not all of it."""

    settings: W

    def __init__(self, world: World, settings: W, flat: Flat, nominal: int, spans: Spans | None = None) -> None:
        super().__init__(world)
        self.settings, self.flat, self.nominal = settings, flat, nominal
        self.spans: Spans = spans or (lambda bucket: [bucket.span])
        self.committed, self.weight, self.largest = 0, 1.0, 0.0
        self.residual: Kept = {}
        self.owner: Kept = {}
        self.worth: dict[int, float] = {}  # the weight at which a bucket's residuals count as they are

    def begin(self, committed: int, weight: float) -> None:
        self.committed, self.largest = committed, max(self.largest, weight)
        self.weight = max(weight, LEAST * self.largest) if weight > 0 else weight

    # ------------------------------------------------------------------ flights
    @abstractmethod
    def summing(self, key: str) -> Work: ...

    @abstractmethod
    def scattering(self, key: str) -> Work: ...

    def launch(self, key: str) -> Launched:
        bucket = self.flat.buckets[int(key.rpartition(".")[2])]
        before = self.worth.get(bucket.index, self.weight)
        factor = 0.0
        if self.weight > 0:
            self.worth[bucket.index] = self.weight
            factor = before / self.weight
        return Launched(bucket, self.name(key), factor, self.committed)

    def spend(self, x: torch.Tensor, launch: Launched) -> torch.Tensor:
        """x and all that was kept for it, for a sum that is exact and leaves nothing."""
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
        """Vectors over what arrives here of which only the sum over ranks counts, but for those of owners."""
        return {"residual": self.residual}

    def own(self, bucket: Bucket) -> list[Span]:
        """Spans of this rank's piece of what arrives here."""
        spans = self.spans(bucket)
        size = sum(span.stop - span.start for span in spans) // self.world.size
        first, last = size * self.world.rank, size * (self.world.rank + 1)
        own, offset = [], 0
        for span in spans:
            start, stop = max(first - offset, 0), min(last - offset, span.stop - span.start)
            if start < stop:
                own.append(span._replace(start=span.start + start, stop=span.start + stop))
            offset += span.stop - span.start
        return own

    def state(self) -> tuple[Values, dict[str, Spanned], dict[str, torch.Tensor]]:
        summed = {name: self._spanned(kept, self.spans) for name, kept in self.kept().items() if kept}
        if self.owner:
            summed["owner"] = self._spanned(self.owner, self.own)
        worth = {str(index): worth for index, worth in self.worth.items()}
        return {"worth": worth, "largest": self.largest}, summed, {}

    def load(self, shared: Values, summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        """What the owner's vector holds outside the pieces that this rank owns now is added to its residual; at the
        same world size there is nothing."""
        self.worth = {int(index): worth for index, worth in shared["worth"].items()}
        self.largest = shared.get("largest", max(self.worth.values(), default=0.0))  # an older version had no bound
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

    def _keep(self, kept: Kept, bucket: Bucket, values: torch.Tensor) -> None:
        if values.any():
            values = values.to(self.flat.x.device)
            kept[bucket.index] = kept[bucket.index] + values if bucket.index in kept else values


def of_bucket(kept: Kept, index: int, like: torch.Tensor) -> torch.Tensor:
    """What is kept of a bucket; zeros at first."""
    if index not in kept:
        kept[index] = torch.zeros_like(like)
    return kept[index]


def _read(vector: torch.Tensor, spans: list[Span]) -> torch.Tensor:
    return torch.cat([vector[span.start : span.stop] for span in spans])
