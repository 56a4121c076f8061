"""What exchanges with rounds have in common: hooks, meta, counting, and what a checkpoint holds.

A round is what a rank computes between two launches of its gradients. Where it is closed by count, which is the rule,
its meta is posted when it begins, with its tokens and what came of the round before. What is said of round r is
therefore known when the meta of round r + 1 has landed, and the report of a commit is handed out with the next commit.
An exchange fills in `end_round`: what happens once the buckets of a round are on their way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import nn

from hvdllm.device import Later, Mark
from hvdllm.exchange import noise
from hvdllm.exchange.base import (
    Batch,
    Commit,
    Divisor,
    NotFinite,
    Report,
    Rounded,
    Settled,
    State,
    Update,
    Values,
    Wire,
)  # fmt: skip
from hvdllm.exchange.buckets import Buckets
from hvdllm.exchange.common import Common, S
from hvdllm.exchange.meta import MetaPost, Metas, MetaSum
from hvdllm.exchange.tally import Heard, Interval, RankReport, Tally
from hvdllm.flat import Bucket, Flat, Span
from hvdllm.world.base import Flight, World


@dataclass
class CurrentRound:
    """The round that this rank computes now.

    begin, cpu_s: when it began, and the CPU seconds of the process at that time
    tokens, micro_batches: computed so far
    announced: the tokens that its meta says it has
    launched: when its first bucket was launched; wait: when its last backward was over
    stream: the number that the stream gives it
    """

    begin: Mark
    cpu_s: float
    wait: Mark
    tokens: int = 0
    micro_batches: int = 0
    announced: int = 0
    launched: Mark | None = None
    stream: int = 0
    meta: MetaPost | None = None

    @property
    def flies(self) -> Mark:
        """Since when something of it travels."""
        return self.launched or self.wait


@dataclass
class Computed:
    """A finished round of this rank, before the host has read what came of it. sums: of token losses in nats, and the
    squared norm of the gradient's sum."""

    round: int
    sums: Later
    tokens: int
    micro_batches: int
    cpu_s: float


@dataclass
class Applied:
    """A commit, before the host has read its norm.

    stream: the numbers that the stream gives to its rounds, so that they can be dealt again
    left: the weights have moved on since its gradients were taken
    """

    step: int
    norm: Later
    stream: list[int]
    left: bool


class RoundTally(Tally):
    """What rounds keep beside what every exchange keeps. parts: rounds in a global batch.

    round: number of the round that begins next, or is being computed
    told: hears what this rank has to tell of a round, and the norm of its sum, as soon as the host has read them
    """

    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts, self.round = parts, 0
        self.told: Callable[[RankReport, float], None] | None = None
        self.computed: Computed | None = None
        self.applied: Applied | None = None
        self._last: tuple[list[int], float, float] | None = None  # of the last commit: its rounds, tokens and norm
        self._heard: dict[int, Heard] = {}  # of rounds that are not reported yet
        self._noise: tuple[float, float] | None = None  # smoothed parts of the noise scale
        self._landed: Mark | None = None  # when the last flight had landed

    def hear(self, meta: MetaSum, round: int) -> None:
        """Books what the meta of this round tells of the round before."""
        if round > 0:
            self._heard[round - 1] = Heard.of(meta)
        self.ask(meta.asks)

    def read_round(self) -> None:
        """Reads, once, what came of the last round and of the last update; this is the one host read of an update.
        Raises NotFinite on every rank, since the norm is that of the sum."""
        if self.computed is not None:
            done, self.computed = self.computed, None
            loss, squares = done.sums.read()
            tokens = float(done.tokens)
            self.own = RankReport(
                0, loss, tokens, squares / max(tokens, 1.0), cpu_s=done.cpu_s, micro_batches=float(done.micro_batches)
            )
            self.read_seconds(done.round // self.parts + 1)
        if self.applied is not None:
            applied, self.applied = self.applied, None
            norm = applied.norm.read()[0]
            assert self._last is not None
            self._last = (*self._last[:2], norm)
            if not math.isfinite(norm):
                raise NotFinite(applied.step, applied.stream, norm, self.parts, applied.left)
            if self.told is not None:
                self.told(self.own, norm)

    def _since(self, lane: str, begin: Mark, end: Mark) -> Mark:
        """A sum may be launched before the last one has landed; the time in which both travel counts once."""
        if lane == "flight":
            if self._landed is not None and self._landed.until(end) < begin.until(end):
                begin = self._landed
            self._landed = end
        return begin

    def commits(self, tokens: float, rounds: list[int], applied: Applied) -> None:
        """A commit has been made of these rounds; its report is not known yet."""
        self._last, self.applied = (rounds, tokens, math.nan), applied

    def report(self, size: int, noisy: bool) -> Report | None:
        """That of the last commit, once; None where there was none, or it was reported already."""
        if self._last is None:
            return None
        (rounds, tokens, norm), self._last = self._last, None
        heard = sum((self._heard.pop(r, Heard()) for r in rounds), Heard())
        found = noise.estimate(heard.squares, norm, tokens, size) if noisy else None
        if found is not None:
            self._noise = noise.smooth(self._noise, found)
        return heard.report(norm, size, noise.scale(self._noise))

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> Values:
        return {
            "tokens": self.tokens, "step": self.step, "round": self.round, "last": list(self._last or ()),
            "noise": self._noise, "said": {str(round): asdict(heard) for round, heard in self._heard.items()},
        }  # fmt: skip

    def mine(self) -> Values:
        return {"said": self.own.totals(), "slot": self.own.slot()}

    def load(self, shared: Values, size: int | None = None) -> None:
        self.tokens, self.step, self.round = shared["tokens"], shared["step"], shared["round"]
        self._last = tuple(shared["last"]) or None
        self._noise = tuple(shared["noise"]) if shared["noise"] else None
        self._heard = {int(round): Heard(**heard) for round, heard in shared["said"].items()}
        if size is not None:
            for heard in self._heard.values():
                heard.slots = {}

    def load_mine(self, mine: list[Values], rank: int, size: int) -> None:
        if len(mine) == size:
            self.own = RankReport(**mine[rank]["said"], **mine[rank]["slot"])
        elif rank == 0:  # it speaks for all ranks that there were, and their seconds are left out
            self.own = RankReport(**{key: sum(each["said"][key] for each in mine) for key in self.own.totals()})


class Rounds(Common[S]):
    """parts: rounds in a global batch. hooks: it launches buckets of the flat vector itself. one_point: all gradients
    of a commit are taken at the same weights, without which there is no noise scale."""

    parts = 1
    hooks = True
    one_point = True
    tally: RoundTally

    def __init__(self, settings: S, nominal: int) -> None:
        super().__init__(settings, nominal)
        self.tally = RoundTally(self.parts)
        # How many tokens of all ranks are committed once so many more are committed here. An outer exchange knows of
        # more ranks than its inner one.
        self.reckon: Callable[[int], int] = lambda more: self.tally.tokens + more

    # ------------------------------------------------------------------ what a rank owns, and how it launches
    def spans(self) -> list[Span]:
        """The elements that this rank updates: everything, where replicas are whole."""
        return self.flat.pieces(0, 1)

    def send(self, bucket: Bucket) -> Flight:
        """Only enqueues."""
        span = bucket.span
        return self.wire.sum(self.flat.g[span.start : span.stop], f"grad.{bucket.index}")

    def total(self, squares: torch.Tensor) -> torch.Tensor:
        """The sum over the owners of the pieces. Here each rank has the whole. Different models of processor may round
        it differently, though, and replicas that clip by different norms drift apart; in that case all ranks take the
        first rank's norm."""
        if not self.unlike or self.world.size == 1:
            return squares
        first: torch.Tensor = self.world.broadcast(squares.reshape(1), "total.0").land().reshape(())
        return first

    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        self.flat, self.update, self.wire, self.world = flat, update, wire, world
        # Squares are of gradients as they are, and the norm is of what arrives: on a rough wire the two do not match.
        self.noisy = self.one_point and world.size > 1 and not wire.rough
        self.owned = self.spans()
        self.pieces = self.slices_of(flat.x)
        update.attach(flat, self.owned)
        self.metas = Metas(world)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device).unbind()  # of losses, and of squares
        self.buckets = Buckets(flat, self._launch)
        if self.hooks and world.size > 1:  # alone nothing can be hidden, and a hook costs a Python call a parameter
            self.buckets.hook(flat)
        return model

    @property
    def device(self) -> torch.device:
        return self.flat.x.device

    def _launch(self, bucket: Bucket) -> Flight:
        if self.now.launched is None:
            self.now.launched = Mark(self.device)
        if self.noisy:
            span = bucket.span
            self.sums[1].add_(torch.linalg.vector_norm(self.flat.g[span.start : span.stop]).square())
        return self.send(bucket)

    def slices_of(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """This rank's pieces of a vector over the flat vector."""
        return [vector[span.start : span.stop] for span in self.owned]

    # ------------------------------------------------------------------ the round
    def feed(self, stream: Rounded) -> Iterator[Batch]:
        for batches in stream.rounds(self.parts):
            self.begin()
            self.announce(sum(batch.tokens for batch in batches))
            for batch in batches:
                self.arm(batch)
                yield batch

    def begin(self) -> None:
        """Before the first forward of a round: reads what came of the round before."""
        self.tally.read_round()
        self.wire.begin(self.tokens, self.update.rate(self.applied_at()) / self.nominal)
        begin = Mark(self.device)
        self.now = CurrentRound(begin, time.process_time(), begin)

    def applied_at(self) -> int:
        """The tokens that will be committed with the round that begins, if all batches are nominal."""
        return self.reckon(self.nominal)

    def arm(self, batch: Batch) -> None:
        self.buckets.arm(batch.last and batch.tokens > 0 and self.world.size > 1)

    def disarm(self) -> None:
        self.buckets.arm(False)

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        self.computes(batch, loss)
        if not batch.last:
            return None
        flights = self.buckets.launch_rest()
        self.now.wait, self.now.stream = Mark(self.device), batch.round
        commit = self.end_round(flights)
        self.tally.round += 1
        return commit

    def computes(self, batch: Batch, loss: torch.Tensor) -> None:
        """Counts a micro-batch of this round."""
        self.sums[0].add_(loss)
        self.now.tokens += batch.tokens
        self.now.micro_batches += batch.tokens > 0

    def end_round(self, flights: list[Flight]) -> Commit | None:
        """The round's buckets are on their way: lands and applies what is due. Calls `computed` once."""
        raise NotImplementedError

    def computed(self, blocked: list[Interval], flights: list[Interval]) -> None:
        """This round is over. blocked: when compute stood still, in order; flights: when something travelled."""
        now = self.now
        lanes = {"blocked": blocked, "flight": flights} if self.world.size > 1 else {}
        borders = [now.begin, *(mark for each in blocked for mark in each), Mark(self.device)]
        lanes["compute"] = list(zip(borders[::2], borders[1::2], strict=True))
        for lane, intervals in lanes.items():
            for begin, end in intervals:
                self.tally.passed(lane, begin, end)
        sums = Later(torch.stack(self.sums))
        cpu_s = time.process_time() - now.cpu_s
        self.tally.computed = Computed(self.tally.round, sums, now.tokens, now.micro_batches, cpu_s)
        for each in self.sums:
            each.zero_()

    def divisor(self, tokens: float) -> Divisor:
        return Divisor(tokens, self.reckon(int(tokens)))

    def commit(
        self, tokens: float, lr: float, norm: Later, rounds: list[int], stream: Sequence[int], staleness: float = 0.0,
        left: bool = False,
    ) -> Commit:  # fmt: skip
        """tokens: of all ranks, in this commit. rounds, stream: the numbers of its rounds, here and in the stream."""
        self.tally.held = self.report()
        commit = self.tally.commit(int(tokens), lr, None, self.tally.take_asks(), staleness)
        self.tally.commits(tokens, rounds, Applied(commit.step, norm, list(stream), left))
        return commit

    def report(self) -> Report | None:
        return self.tally.report(self.world.size, self.noisy)

    # ------------------------------------------------------------------ meta
    def post(self, tokens: int) -> MetaPost:
        """The tokens of a round and what came of the round before, in one vector."""
        own = self.tally.own
        return self.metas.post({"tokens": float(tokens), **own.totals()}, own.slot())

    def announce(self, tokens: int) -> None:
        """Posts the meta of the round that is open, which has so many tokens here."""
        self.now.meta, self.now.announced = self.post(tokens), tokens

    def hear(self) -> MetaSum:
        """Lands this round's meta and books it."""
        assert self.now.meta is not None
        meta = self.now.meta.land()
        self.tally.hear(meta, self.tally.round)
        return meta

    # ------------------------------------------------------------------ acts
    def consensus(self) -> AbstractContextManager[int | None]:
        self.land()
        return nullcontext()

    def land(self) -> None:
        """Lands, without applying, what flies; reads what can be known. Raises NotFinite."""
        self.tally.read_round()

    def settle(self) -> Settled:
        self.land()
        settled = self.rest()
        self.tally.read_round()
        self.tally.hear(self.post(0).land(), self.tally.round)
        return settled or Settled(self.report())

    def rest(self) -> Settled | None:
        """Lands and commits what flies, where something may."""
        return None

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        self.land()
        shared, vectors = self.update.state()
        wire, summed, tensors = self.wire.state()
        return State(
            {**self.tally.state(), "wire": wire, **shared},
            self.owned if self.hands_out() else [],
            {"model": torch.cat(self.pieces), **vectors},
            self.tally.mine(),
            summed,
            tensors,
        )

    def hands_out(self) -> bool:
        """Whether this rank writes its pieces. Where replicas are whole and equal, only rank 0 does."""
        return self.world.rank == 0

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        fresh = self.state()
        vectors = {kind: torch.zeros_like(self.flat.x, device="cpu") for kind in fresh.sharded}
        vectors |= {"model": model} | moments
        shared = fresh.shared | ({"steps": steps} if moments else {})
        self.load(State(shared, [], vectors, {}, {}, fresh.tensors), [fresh.mine] * self.world.size)

    def load(self, state: State, mine: list[Values]) -> None:
        size = self.world.size
        self.tally.load(state.shared, None if len(mine) == size else size)
        self.tally.load_mine(mine, self.world.rank, size)
        self.flat.x.copy_(state.sharded["model"])
        names = self.update.state()[1]
        self.update.load(state.shared, {name: torch.cat(self.slices_of(state.sharded[name])) for name in names})
        self.wire.load(state.shared["wire"], state.summed, state.tensors)
