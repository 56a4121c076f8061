"""What exchanges with rounds have in common: hooks, meta, counting, and what a checkpoint holds.

A round is what a rank computes between two launches of its gradients. Closed by count (the rule), meta is posted when
it begins, with its tokens and what came of the round before; so what is said of round r is known when meta of r + 1 has
landed, and a commit is reported at the next one. An exchange fills in `close`: what happens when the buckets of a
round are on their way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from hvdllm.device import Later, Mark
from hvdllm.exchange import noise
from hvdllm.exchange.base import Batch, Commit, NotFinite, Report, Settled, State, Update, Wire
from hvdllm.exchange.buckets import Buckets
from hvdllm.exchange.meta import SLOT, MetaPost, MetaSum
from hvdllm.world.base import Asks, Flight, World

LANES = ("compute", "blocked", "flight")
Interval = tuple[Mark, Mark]


@dataclass
class Counts:
    """What Update needs of a round."""

    tokens: float
    committed: int


@dataclass
class Said:
    """What all ranks said of one round."""

    loss: float = 0.0
    loss_tokens: float = 0.0
    squares: float = 0.0
    slots: dict[str, list[float]] = field(default_factory=dict)

    def __add__(self, other: Said) -> Said:
        slots = {k: [a + b for a, b in zip(v, other.slots[k], strict=True)] for k, v in self.slots.items()}
        return Said(
            self.loss + other.loss, self.loss_tokens + other.loss_tokens, self.squares + other.squares,
            slots or other.slots,
        )  # fmt: skip


@dataclass
class Computed:
    """A round of this rank, before the host has read what came of it."""

    round: int
    sums: Later  # of token losses in nats; squared norm of the gradient's sum
    tokens: int
    micro_batches: int
    intervals: list[tuple[str, Mark, Mark]]  # lane, begin, end
    cpu_s: float


@dataclass
class Applied:
    """A commit, before the host has read its norm. rounds: the exchange's own numbers of those it is made of; stream:
    theirs, to deal them again."""

    step: int
    norm: Later
    tokens: float
    rounds: list[int]
    stream: list[int]
    left: bool  # have the weights moved on since these gradients were taken?


class Rounds:
    """settings: of the exchange. nominal: tokens of a global batch."""

    copies = 1
    identical = True
    anchored = False
    marks_on_ask = False
    resized = ""
    parts = 1  # rounds a global batch
    hooks = True  # does it launch buckets of the map itself?
    unlike = False  # do its ranks compute on several models of processor? Set before `attach`.
    one_point = True  # are all gradients of a commit taken at the same weights? The noise scale needs it.

    def __init__(self, settings: Any, nominal: int) -> None:
        self.settings, self.nominal = settings, nominal
        self.tokens = self.step = self.round = 0
        self.watch: Callable[[int, str, Mark, Mark], None] | None = None  # (step, lane, begin, end): trace_steps
        # Tokens of all ranks once so many more are committed here; an outer exchange knows more than its inner one.
        self.reckon: Callable[[int], int] = lambda more: self.tokens + more
        # Hears what this rank has to say of a round, and the norm of its sum, as soon as they are read.
        self.told: Callable[[dict[str, float], dict[str, float], float], None] | None = None
        self._mine: dict[str, float] = dict.fromkeys(("loss", "loss_tokens", "squares"), 0.0)
        self._slot: dict[str, float] = dict.fromkeys(SLOT, 0.0)
        self._computed: Computed | None = None
        self._applied: Applied | None = None
        self._said: dict[int, Said] = {}
        self._last: list[Any] = []  # of the last commit: rounds, tokens, norm
        self._noise: tuple[float, float] | None = None  # smoothed parts of the noise scale
        self._asks = Asks()
        self._parity = 0
        self._flown: Mark | None = None  # when the last flight had landed
        self._launched: Mark | None = None  # this round's first bucket

    def between(self, world: World) -> World:
        return world

    # ------------------------------------------------------------------ what a rank owns, and how it launches
    def spans(self) -> list[Any]:
        """The elements that this rank updates: everything, where replicas are whole."""
        spans: list[Any] = self.flat.pieces(0, 1)
        return spans

    def send(self, bucket: Any) -> Flight:
        """Only enqueues."""
        span = bucket.span
        return self.wire.sum(self.flat.g[span.start : span.stop], f"grad.{bucket.index}")

    def total(self, squares: torch.Tensor) -> torch.Tensor:
        """The sum over the owners of the pieces. Each rank has the whole; but models of processors may round it each in
        their way, and replicas that clip by different norms drift apart: there the first rank's norm is everybody's."""
        if not self.unlike or self.world.size == 1:
            return squares
        first: torch.Tensor = self.world.broadcast(squares.reshape(1), "total.0").land().reshape(())
        return first

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        self.flat, self.update, self.wire, self.world = flat, update, wire, world
        self.device = flat.x.device
        # Squares are of gradients as they are, the norm of what arrives: a rough wire would make a scale of its own.
        self.noisy = self.one_point and world.size > 1 and not wire.rough
        self.owned = self.spans()
        update.attach(flat, self.owned)
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self._squares = torch.zeros((), dtype=torch.float64, device=self.device)
        self.buckets = Buckets(flat, self._launch)
        if self.hooks and world.size > 1:  # alone nothing can be hidden, and a hook costs a Python call a parameter
            self.buckets.hook(flat)
        return model

    def _launch(self, bucket: Any) -> Flight:
        if self._launched is None:
            self._launched = Mark(self.device)
        if self.noisy:
            span = bucket.span
            self._squares += torch.linalg.vector_norm(self.flat.g[span.start : span.stop]).square()
        return self.send(bucket)

    def cut(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """This rank's pieces of a vector over the map."""
        return [vector[span.start : span.stop] for span in self.owned]

    # ------------------------------------------------------------------ the round
    def feed(self, stream: Any) -> Iterator[Batch]:
        for batches in stream.rounds(self.parts):
            self.begin()
            self.meta = self.post(sum(batch.tokens for batch in batches))
            for batch in batches:
                self.arm(batch)
                yield batch

    def begin(self) -> None:
        """Before a round's first forward: reads what came of the one before."""
        self._read()
        self.wire.begin(self.tokens, self.update.rate(self.applied_at()) / self.nominal)
        self._own = self._micro_batches = 0
        self._launched = None
        self._intervals: list[tuple[str, Mark, Mark]] = []
        self._begin, self._cpu = Mark(self.device), time.process_time()

    def applied_at(self) -> int:
        """Tokens that will be committed with the round that begins, going by nominal batches."""
        return self.reckon(self.nominal)

    def arm(self, batch: Batch) -> None:
        self.buckets.arm(batch.last and batch.tokens > 0 and self.world.size > 1)

    def disarm(self) -> None:
        self.buckets.arm(False)

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        self._loss += loss
        self._own += batch.tokens
        self._micro_batches += batch.tokens > 0
        if not batch.last:
            return None
        flights = self.buckets.launch_rest()
        self._wait = Mark(self.device)
        self._stream_round = batch.round
        commit = self.close(flights)
        self.round += 1
        return commit

    def close(self, flights: list[Flight]) -> Commit | None:
        """The round's buckets are on their way: land and apply what is due. Calls `computed` once."""
        raise NotImplementedError

    def computed(self, blocked: list[Interval], flights: list[Interval]) -> None:
        """This round is over. blocked: when compute stood still, in order; flights: when something travelled."""
        if self.world.size > 1:
            self._intervals += [("blocked", *each) for each in blocked]
            self._intervals += [("flight", *each) for each in flights]
        borders = [self._begin, *(mark for each in blocked for mark in each), Mark(self.device)]
        self._intervals += [("compute", *each) for each in zip(borders[::2], borders[1::2], strict=True)]
        self._computed = Computed(
            self.round, Later(torch.stack([self._loss, self._squares])), self._own, self._micro_batches,
            self._intervals, time.process_time() - self._cpu,
        )  # fmt: skip
        self._loss.zero_()
        self._squares.zero_()

    def counts(self, tokens: float) -> Counts:
        return Counts(tokens, self.reckon(int(tokens)))

    def commit(
        self,
        tokens: float,
        lr: float,
        norm: Later,
        rounds: list[int],
        stream: list[int],
        staleness: float = 0.0,
        left: bool = False,
    ) -> Commit:
        """tokens: of all ranks, in this commit. rounds: numbers of those it is made of."""
        before = self.report()
        self.tokens, self.step = self.tokens + int(tokens), self.step + 1
        self._applied = Applied(self.step, norm, tokens, rounds, stream, left)
        self._last = [rounds, tokens, math.nan]
        asks, self._asks = self._asks, Asks()
        return Commit(self.tokens, self.step, lr, staleness, before, asks)

    # ------------------------------------------------------------------ meta
    def post(self, tokens: int) -> MetaPost:
        """The tokens of a round and what came of the one before, in one vector."""
        self._parity, self.posted = 1 - self._parity, tokens
        return MetaPost(self.world, self._parity, {"tokens": float(tokens), **self._mine}, self._slot)

    def hear(self, meta: MetaSum, round: int) -> None:
        """Books what the meta of this round says of the one before."""
        if round > 0:
            self._said[round - 1] = Said(meta.loss, meta.loss_tokens, meta.squares, meta.slots)
        self._asks = Asks(self._asks.stop or meta.asks.stop, self._asks.save or meta.asks.save)

    def heard(self) -> MetaSum:
        """Lands this round's meta and books it."""
        meta = self.meta.land()
        self.hear(meta, self.round)
        return meta

    def _read(self) -> None:
        """Reads, once, what came of the last round and commit; the one host read of a commit. Raises NotFinite, on
        every rank: the norm is that of the sum."""
        if self._computed is not None:
            done, self._computed = self._computed, None
            loss, squares = done.sums.read()
            tokens = float(done.tokens)
            self._mine = {"loss": loss, "loss_tokens": tokens, "squares": squares / max(tokens, 1.0)}
            seconds = dict.fromkeys(LANES, 0.0)
            for lane, begin, end in done.intervals:
                if lane == "flight":
                    # One may be launched before the last has landed: that time is booked already.
                    if self._flown is not None and self._flown.until(end) < begin.until(end):
                        begin = self._flown
                    self._flown = end
                seconds[lane] += begin.until(end)
                if self.watch is not None:
                    self.watch(done.round // self.parts + 1, lane, begin, end)
            self._slot = {f"{lane}_s": seconds[lane] for lane in LANES}
            self._slot |= {"cpu_s": done.cpu_s, "micro_batches": float(done.micro_batches)}
        if self._applied is not None:
            applied, self._applied = self._applied, None
            norm = applied.norm.read()[0]
            self._last[2] = norm
            if not math.isfinite(norm):
                raise NotFinite(applied.step, applied.stream, norm, self.parts, applied.left)
            if self.told is not None:
                self.told(self._mine, self._slot, norm)

    def report(self) -> Report | None:
        """Of the last commit, once; None where there was none, or it is reported."""
        if not self._last:
            return None
        (rounds, tokens, norm), self._last = self._last, []
        said = sum((self._said.pop(r, Said()) for r in rounds), Said())
        slots = said.slots or {name: [0.0] * self.world.size for name in SLOT}
        found = noise.estimate(said.squares, norm, tokens, self.world.size) if self.noisy else None
        if found is not None:
            self._noise = noise.smooth(self._noise, found)
        return Report(said.loss, said.loss_tokens, norm, noise.scale(self._noise), **slots)

    # ------------------------------------------------------------------ acts
    def consensus(self) -> AbstractContextManager[int | None]:
        self.land()
        return nullcontext()

    def land(self) -> None:
        """Lands, without applying, what flies; reads what can be known. Raises NotFinite."""
        self._read()

    def settle(self) -> Settled:
        """Lands and applies what is in flight; `rest` does it where something may be."""
        self.land()
        settled = self.rest()
        self._read()
        self.hear(self.post(0).land(), self.round)
        return settled or Settled(self.report())

    def rest(self) -> Settled | None:
        """Commits what flies, where something may."""
        return None

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        self.land()
        shared, vectors = self.update.state()
        wire_shared, summed, tensors = self.wire.state()
        mine = {
            "tokens": self.tokens, "step": self.step, "round": self.round, "last": self._last, "wire": wire_shared,
            "noise": self._noise,
            "said": {str(round): asdict(said) for round, said in self._said.items()},
        }  # fmt: skip
        return State(
            {**mine, **shared},
            self.owned if self.hands_out() else [],
            {"model": torch.cat(self.cut(self.flat.x)), **vectors},
            {"said": self._mine, "slot": self._slot},
            summed,
            tensors,
        )

    def hands_out(self) -> bool:
        """Does this rank write its pieces? Where replicas are whole and equal rank 0 alone does."""
        return self.world.rank == 0

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        fresh = self.state()
        vectors = {kind: torch.zeros_like(self.flat.x, device="cpu") for kind in fresh.sharded}
        vectors |= {"model": model} | moments
        shared = fresh.shared | ({"steps": steps} if moments else {})
        self.load(State(shared, [], vectors, {}, {}, fresh.tensors), [fresh.mine] * self.world.size)

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        shared = state.shared
        self.tokens, self.step, self.round = shared["tokens"], shared["step"], shared["round"]
        self._last = list(shared["last"])
        self._noise = tuple(shared["noise"]) if shared["noise"] else None
        self._said = {int(round): Said(**said) for round, said in shared["said"].items()}
        self.flat.x.copy_(state.sharded["model"])
        names = self.update.state()[1]
        self.update.load(shared, {name: torch.cat(self.cut(state.sharded[name])) for name in names})
        self.wire.load(shared["wire"], state.summed, state.tensors)
        if len(mine) == self.world.size:
            own = mine[self.world.rank]
            self._mine, self._slot = dict(own["said"]), dict(own["slot"])
        else:  # another world size: rank 0 speaks for all that were, and their seconds are left out
            for said in self._said.values():
                said.slots = {}
            if self.world.rank == 0:
                self._mine = {key: sum(other["said"][key] for other in mine) for key in self._mine}
