"""Synchronous all-reduce with gradient accumulation.

Invariant: with equal global batches exactly equal, up to rounding, to one process that takes the whole batch,
whatever the number of ranks and micro-batches; all replicas are bit-equal at every commit.

    for each micro-batch j of rank i:   G_i += d(sum of token losses)
    G = sum_i G_i,  n = sum_i n_i       # buckets travel from hooks of the last backward; meta carries n_i
    x = Update(x, G / n)

State: the update's. Bytes a rank and step: 2 (N-1)/N P b (ring) and meta. Staleness 0. Every rank waits for
the slowest and for the network, less what the backward still hides. Source: EXCHANGES.md, section 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hvdllm.config.schema import AllReduce as Settings
from hvdllm.device import Later, Mark
from hvdllm.exchange.base import Batch, Commit, NotFinite, Report, State, Stream, Update, Wire
from hvdllm.exchange.buckets import Buckets
from hvdllm.exchange.meta import MetaPost, MetaSum
from hvdllm.world.base import Flight, World


@dataclass
class Applied:
    """A round that is applied, before the host has read what came of it."""

    round: int
    loss: Later  # this rank's sum, nats
    tokens: int  # this rank's
    norm: Later
    micro_batches: int
    marks: tuple[Mark, Mark, Mark, Mark, Mark]  # begin, first launch, wait, landed, end


@dataclass
class Counts:
    """What Update needs of a round."""

    tokens: float
    committed: int


class AllReduce:
    def __init__(self, settings: Settings) -> None:
        self.tokens = self.step = 0
        self._applied: Applied | None = None
        # What the next meta says of the round before it.
        self._said: dict[str, float] = {"loss": 0.0, "loss_tokens": 0.0}
        self._slot = dict.fromkeys(("compute_s", "blocked_s", "flight_s", "micro_batches"), 0.0)
        self._norm = math.nan
        self._parity = 0
        self._launched: Mark | None = None  # of this round's first bucket

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        self.flat, self.update, self.world = flat, update, world
        self.device = flat.x.device
        self.spans = flat.pieces(0, 1)
        update.attach(flat, self.spans)
        self.pieces = [flat.x[span.start : span.stop] for span in self.spans]
        self.gradients = [flat.g[span.start : span.stop] for span in self.spans]
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)

        def launch(bucket: Any) -> Flight:
            if self._launched is None:
                self._launched = Mark(self.device)
            return wire.sum(flat.g[bucket.span.start : bucket.span.stop], f"grad.{bucket.index}")

        self.buckets = Buckets(flat, launch)
        if world.size > 1:  # alone nothing can be hidden, and a hook costs a Python call a parameter
            self.buckets.hook(flat)
        return model

    def feed(self, stream: Stream) -> Iterator[Batch]:
        for batches in stream.rounds():
            self._meta = self._post(sum(batch.tokens for batch in batches))
            self._begin, self._launched, self._micro_batches = Mark(self.device), None, 0
            for batch in batches:
                self.buckets.arm(batch.last and batch.tokens > 0 and self.world.size > 1)
                yield batch

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        self._loss += loss
        self._own += batch.tokens
        self._micro_batches += batch.tokens > 0
        if not batch.last:
            return None
        flights = self.buckets.launch_rest()
        wait = Mark(self.device)
        for flight in flights:
            flight.land()
        meta = self._meta.land()
        landed = Mark(self.device)
        counts = Counts(meta.tokens, self.tokens + int(meta.tokens))
        lr, norm = self.update.step(self.pieces, self.gradients, counts, lambda sums: sums)
        self.flat.g.zero_()
        marks = (self._begin, self._launched or wait, wait, landed, Mark(self.device))
        self._applied = Applied(self.step, Later(self._loss), self._own, norm, self._micro_batches, marks)
        self._loss.zero_()
        before = self._report(meta) if self.step else None
        self.tokens, self.step = counts.committed, self.step + 1
        return Commit(self.tokens, self.step, lr, 0.0, before, meta.asks)

    def consensus(self) -> AbstractContextManager[None]:
        self._read()
        return nullcontext()

    def settle(self) -> Report | None:
        return self._report(self._post(0).land()) if self.step else None

    # ------------------------------------------------------------------ meta
    def _post(self, tokens: int) -> MetaPost:
        """This round's tokens and what came of the round before, in one vector; the one host read of a commit."""
        self._read()
        self._own = 0
        self._parity = 1 - self._parity
        return MetaPost(self.world, self._parity, {"tokens": float(tokens), **self._said}, self._slot)

    def _read(self) -> None:
        """Reads, once, what came of the last round. Raises NotFinite, on every rank: the norm is that of the sum."""
        if self._applied is None:
            return
        applied, self._applied = self._applied, None
        begin, launched, wait, landed, end = applied.marks
        self._said = {"loss": applied.loss.read()[0], "loss_tokens": float(applied.tokens)}
        self._norm = applied.norm.read()[0]
        self._slot = {
            "compute_s": begin.until(wait) + landed.until(end),
            "blocked_s": wait.until(landed) if self.world.size > 1 else 0.0,
            "flight_s": launched.until(landed) if self.world.size > 1 else 0.0,
            "micro_batches": float(applied.micro_batches),
        }
        if not math.isfinite(self._norm):
            raise NotFinite(applied.round + 1, applied.round, self._norm)

    def _report(self, meta: MetaSum) -> Report:
        return Report(meta.loss, meta.loss_tokens, self._norm, **meta.slots)

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        self._read()
        shared, vectors = self.update.state()
        return State(
            {"tokens": self.tokens, "step": self.step, "norm": self._norm, **shared},
            self.spans if self.world.rank == 0 else [],  # replicas are whole and equal: rank 0 hands out its own
            {"model": self.flat.x, **vectors},
            {"said": self._said, "slot": self._slot},
        )

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        self.tokens, self.step, self._norm = (state.shared[key] for key in ("tokens", "step", "norm"))
        self.flat.x.copy_(state.sharded["model"])
        self.update.load(state.shared, state.sharded)
        if len(mine) == self.world.size:
            own = mine[self.world.rank]
            self._said, self._slot = dict(own["said"]), dict(own["slot"])
        elif self.world.rank == 0:  # another world size: rank 0 speaks for all that were
            self._said = {key: sum(other["said"][key] for other in mine) for key in self._said}
