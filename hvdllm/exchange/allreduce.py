"""Synchronous all-reduce with gradient accumulation.

Invariant: with equal global batches exactly equal, up to rounding, to one process that takes the whole batch,
whatever the number of ranks and micro-batches; all replicas are bit-equal at every commit.

    for each micro-batch j of rank i:   G_i += d(sum of token losses)
    G = sum_i G_i,  n = sum_i n_i       # buckets travel from hooks of the last backward; meta carries n_i
    x = Update(x, G / n)

Tables (hvdllm/tables.py) have rows in place of G: rows.py. Their squares enter the norm, so they are clipped with the
rest.

reduction=adasum: the token mean G_i / n_i of each rank goes through Adasum (Maleki et al., 2020, arXiv 2006.02924),
tensor by tensor, and nothing is divided afterwards. Equal gradients give their mean, orthogonal ones their sum. A rank
with few tokens counts like the others, and the result depends on the order of the ranks.

State: that of the update. Bytes a rank and step: 2 (N-1)/N P b (ring) and the meta. Staleness: 0. Every rank waits for
the slowest one and for the network, except for what the backward hides.

More in hvdllm/exchange/README.md, `allreduce`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from hvdllm.device import Mark
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Batch, Commit, Update, Wire
from hvdllm.exchange.rounds import Rounds
from hvdllm.exchange.rows import Rows
from hvdllm.exchange.wire.plain import Several
from hvdllm.flat import Bucket, Flat
from hvdllm.world.base import Flight, World


class AllReduce(Rounds[exchanges.AllReduce]):
    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        model = super().attach(model, flat, update, wire, world)
        self.gradients = self.slices_of(flat.g)
        self.adasum = self.settings.reduction == "adasum"
        self.rows = Rows(flat, world)
        # With adasum the norm is not that of a mean gradient, and with tables the squares are not of all gradients.
        self.noisy = self.noisy and not self.adasum and not flat.tables
        return model

    def computes(self, batch: Batch, loss: torch.Tensor) -> None:
        super().computes(batch, loss)
        self.rows.take()

    def send(self, bucket: Bucket) -> Flight:
        return self._adasum(bucket) if self.adasum else super().send(bucket)

    def end_round(self, flights: list[Flight]) -> Commit:
        self.rows.launch()
        for flight in flights:
            flight.land()
        meta = self.hear()
        rows = self.rows.land()
        landed = Mark(self.device)
        divisor = self.divisor(meta.tokens)
        if self.adasum:
            divisor = replace(divisor, tokens=1.0)
        lr, norm = self.update.step(self.pieces, self.gradients, divisor, self.total, rows=rows)
        self.flat.g.zero_()
        self.computed([(self.now.wait, landed)], [(self.now.flies, landed)])
        return self.commit(meta.tokens, lr, norm, [self.tally.round], [self.now.stream])

    # ------------------------------------------------------------------ adasum
    def _adasum(self, bucket: Bucket) -> Flight:
        """One operation a tensor, on this rank's token means. The last backward launches it, so all of the rank's
        tokens count."""
        tokens = max(1, self.now.announced)
        flights = []
        for k, name in enumerate(bucket.names):
            x = self.flat.view(name, self.flat.g).view(-1).div_(tokens)
            flights.append(self.world.adasum(x, f"grad.{bucket.index}.{k}.{self.tally.round % 2}"))
        return Several(flights, lambda landed: None)
