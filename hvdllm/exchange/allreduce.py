"""Synchronous all-reduce with gradient accumulation.

Invariant: with equal global batches exactly equal, up to rounding, to one process that takes the whole batch,
whatever the number of ranks and micro-batches; all replicas are bit-equal at every commit.

    for each micro-batch j of rank i:   G_i += d(sum of token losses)
    G = sum_i G_i,  n = sum_i n_i       # buckets travel from hooks of the last backward; meta carries n_i
    x = Update(x, G / n)

reduction=adasum: each rank's token mean G_i / n_i goes through Adasum (Maleki et al., 2020, arXiv 2006.02924), tensor
by tensor, and nothing is divided afterwards: equal gradients give their mean, orthogonal ones their sum. A rank with
few tokens counts like the others. The result depends on the order of ranks.

State: the update's. Bytes a rank and step: 2 (N-1)/N P b (ring) and meta. Staleness 0. Every rank waits for
the slowest and for the network, less what the backward still hides. More in
hvdllm/exchange/README.md, `allreduce`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hvdllm.device import Mark
from hvdllm.exchange.base import Commit, Update, Wire
from hvdllm.exchange.rounds import Counts, Rounds
from hvdllm.exchange.wire.plain import Several
from hvdllm.world.base import Flight, World


class AllReduce(Rounds):
    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        model = super().attach(model, flat, update, wire, world)
        self.noisy = self.noisy and self.settings.reduction == "sum"  # Adasum's norm is no mean gradient's
        self.pieces, self.gradients = self.cut(flat.x), self.cut(flat.g)
        self.adasum = self.settings.reduction == "adasum"
        return model

    def send(self, bucket: Any) -> Flight:
        return self._adasum(bucket) if self.adasum else super().send(bucket)

    def close(self, flights: list[Flight]) -> Commit:
        for flight in flights:
            flight.land()
        meta = self.heard()
        landed = Mark(self.device)
        counts = self.counts(meta.tokens)
        divisor = Counts(1.0, counts.committed) if self.adasum else counts
        lr, norm = self.update.step(self.pieces, self.gradients, divisor, self.total)
        self.flat.g.zero_()
        self.computed([(self._wait, landed)], [(self._launched or self._wait, landed)])
        return self.commit(meta.tokens, lr, norm, [self.round], [self._stream_round])

    # ------------------------------------------------------------------ adasum
    def _adasum(self, bucket: Any) -> Flight:
        """One operation a tensor, on this rank's token means. Launched by the last backward, so all its tokens
        count."""
        tokens = max(1, self.posted)
        flights = []
        for k, name in enumerate(bucket.names):
            x = self.flat.view(name, self.flat.g).view(-1).div_(tokens)
            flights.append(self.world.adasum(x, f"grad.{bucket.index}.{k}.{self.round % 2}"))
        return Several(flights, lambda landed: None)
