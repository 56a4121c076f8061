"""Sharded optimizer state, ZeRO-1 (Rajbhandari et al., 2020, arXiv 1910.02054): sums arrive by pieces.

Invariant: as exact as all-reduce, with 1/N of the optimizer's state a rank; all replicas are bit-equal at every
commit, because every rank gets each piece of the weights from its one owner.

    S = scatter(sum_i G_i)              # this rank's slice of every bucket, from hooks of the last backward
    |g|² = total(S²) / n²               # padding is zero, so each element counts once
    x[own] = Update(x[own], S / n);  x = spread(x[own])

Bytes a rank and step: (N-1)/N P b for the gradients and as much for the weights, together what a ring all-reduce sends,
and one number for the norm. Memory: the update's vectors / N. Staleness: 0. The way back of the weights is not hidden.

More in hvdllm/exchange/README.md, `sharded`.
"""

from __future__ import annotations

import torch

from hvdllm.device import Mark
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Commit
from hvdllm.exchange.common import S
from hvdllm.exchange.rounds import Rounds
from hvdllm.flat import Bucket, Span
from hvdllm.world.base import Flight


class Owners(Rounds[S]):
    """Each rank owns its slice of every bucket."""

    def spans(self) -> list[Span]:
        return self.flat.slices(self.world.rank, self.world.size)

    def send(self, bucket: Bucket) -> Flight:
        span = bucket.span
        return self.wire.scatter(self.flat.g[span.start : span.stop], f"grad.{bucket.index}")

    def total(self, squares: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = self.world.sum(squares.reshape(1), "total.0").land().reshape(())
        return summed

    def spread(self, pieces: list[torch.Tensor]) -> list[Flight]:
        """Every rank gets all pieces: one flight a bucket."""
        return [self.wire.spread(piece, f"param.{b}") for b, piece in enumerate(pieces)]

    def collect(self, flights: list[Flight]) -> None:
        """Copies the pieces into the weights as they land."""
        for bucket, flight in zip(self.flat.buckets, flights, strict=True):
            self.flat.x[bucket.span.start : bucket.span.stop].copy_(flight.land())

    def hands_out(self) -> bool:
        return True


class Sharded(Owners[exchanges.Sharded]):
    def end_round(self, flights: list[Flight]) -> Commit:
        sums = [flight.land() for flight in flights]
        meta = self.hear()
        landed = Mark(self.device)
        lr, norm = self.update.step(self.pieces, sums, self.divisor(meta.tokens), self.total)
        spread = Mark(self.device)
        if self.world.size > 1:
            self.collect(self.spread(self.pieces))
        self.flat.g.zero_()
        done = Mark(self.device)
        self.computed([(self.now.wait, landed), (spread, done)], [(self.now.flies, landed), (spread, done)])
        return self.commit(meta.tokens, lr, norm, [self.tally.round], [self.now.stream])
