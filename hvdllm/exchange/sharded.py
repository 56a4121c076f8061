"""Sharded optimizer state, ZeRO-1 (Rajbhandari et al., 2020, arXiv 1910.02054): sums arrive by pieces.

Invariant: as exact as all-reduce, with 1/N of the optimizer's state a rank; all replicas are bit-equal at every
commit, because every rank gets each piece of the weights from its one owner.

    S = scatter(sum_i G_i)              # this rank's slice of every bucket, from hooks of the last backward
    |g|² = total(S²) / n²               # padding is zero, so each element counts once
    x[own] = Update(x[own], S / n);  x = spread(x[own])

Bytes a rank and step: (N-1)/N P b for the gradients and as much for the weights, what a ring all-reduce sends; one
number more for the norm. Memory: the update's vectors / N. Staleness 0. The weights' way back is not hidden.
More in hvdllm/exchange/README.md, `sharded`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hvdllm.device import Mark
from hvdllm.exchange.base import Commit, Update, Wire
from hvdllm.exchange.rounds import Rounds
from hvdllm.world.base import Flight, World


class Owners(Rounds):
    """Each rank owns its slice of every bucket."""

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        model = super().attach(model, flat, update, wire, world)
        self.pieces = self.cut(flat.x)
        return model

    def spans(self) -> list[Any]:
        spans: list[Any] = self.flat.slices(self.world.rank, self.world.size)
        return spans

    def send(self, bucket: Any) -> Flight:
        span = bucket.span
        return self.wire.scatter(self.flat.g[span.start : span.stop], f"grad.{bucket.index}")

    def total(self, squares: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = self.world.sum(squares.reshape(1), "total.0").land().reshape(())
        return summed

    def spread(self, pieces: list[torch.Tensor]) -> list[Flight]:
        """Every rank gets all pieces: one flight a bucket."""
        return [self.wire.spread(piece, f"param.{b}") for b, piece in enumerate(pieces)]

    def collect(self, flights: list[Flight]) -> None:
        """Into the weights, as they land."""
        for bucket, flight in zip(self.flat.buckets, flights, strict=True):
            self.flat.x[bucket.span.start : bucket.span.stop].copy_(flight.land())

    def hands_out(self) -> bool:
        return True


class Sharded(Owners):
    def close(self, flights: list[Flight]) -> Commit:
        sums = [flight.land() for flight in flights]
        meta = self.heard()
        landed = Mark(self.device)
        lr, norm = self.update.step(self.pieces, sums, self.counts(meta.tokens), self.total)
        spread = Mark(self.device)
        if self.world.size > 1:
            self.collect(self.spread(self.pieces))
        self.flat.g.zero_()
        done = Mark(self.device)
        self.computed([(self._wait, landed), (spread, done)], [(self._launched or self._wait, landed), (spread, done)])
        return self.commit(meta.tokens, lr, norm, [self.round], [self._stream_round])
