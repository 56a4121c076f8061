"""ACCO, accumulate while you communicate (Nabli et al., 2024, arXiv 2406.02613): an update consists of two halves.

Invariant: one half of the gradients of a committed update is taken at the weights x_t, the other half at an estimate
x~_t of them. Each gradient travels once and takes part in exactly one commit. All replicas are bit-equal whenever a
round begins.

    half A (tentative): launch scatter(G~); compute G_t at x_t meanwhile;           landed: S~, n~
                        x~_{t+1} = peek(x_t, S~ / n~);                   spread
    half B (commit):    launch scatter(G_t); compute G~_{t+1} at x~_{t+1} meanwhile;  landed: S, n
                        x_{t+1} = step(x_t, (S~ + S) / (n~ + n));        spread

`peek` is the update out of place and touches no state. At first x~_0 = x_0. With equal data in both halves and plain
descent x~_t = x_t for ever, and ACCO is synchronous descent on the large batch.

Stability: with different data plain descent is stable on f = λx²/2 for 0 < ηλ < min(2, 1/(1-w)), where w is the share
of tokens of the tentative half. For equal halves this is 2, as for synchronous descent; one delayed update allows 1.
There is no systematic staleness.

timed=false: a half is half a global batch, dealt by count. timed=true: a half ends for a rank when what travels has
landed, which it asks before each forward. A fast rank therefore computes more micro-batches; sums are divided by the
tokens of all ranks. Such a run cannot be repeated bit for bit, unless its ranks are logical ones with a simulated clock
(world.tokens_per_s).

Everything behind a launch runs on the driver thread: landing, peek or step, and spreading.

Bytes a rank and update: two rounds of (N-1)/N P (b_gradients + 4). Memory: two gradient vectors; by pieces (1/N) the
master weights, S~, the vectors of the update and, for a moment, a second set of these; and the weights that have
arrived until the loop takes them. At a commit G~ is in flight; a checkpoint has it landed, as S~ and n~.

More in hvdllm/exchange/README.md, `acco`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from hvdllm.device import Later, Mark, wait_for_stream
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Batch, Commit, Divisor, Rounded, Settled, State, Stream, Update, Values, Wire
from hvdllm.exchange.meta import MetaSum
from hvdllm.exchange.sharded import Owners
from hvdllm.exchange.tally import Interval
from hvdllm.flat import Flat
from hvdllm.world.base import Flight, World

TENTATIVE, COMMIT = 0, 1


@dataclass
class Arrived:
    """What the driver made of one half.

    weights: those that came back, of every bucket
    tokens: of the update: n~, or n~ + n
    step: the learning rate and the norm of a commit
    meta: that of the half, where it landed on the driver (timed)
    """

    weights: list[torch.Tensor]
    tokens: float
    step: tuple[float, Later] | None
    meta: MetaSum | None
    flight: Interval


@dataclass
class Half:
    """One half on its way. driven: lands what Arrived says. round, stream: its numbers, here and in the stream."""

    kind: int
    round: int
    stream: int
    driven: Flight


class Acco(Owners[exchanges.Acco]):
    parts = 2
    one_point = False

    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        model = super().attach(model, flat, update, wire, world)
        self.theta = [piece.clone() for piece in self.pieces]  # flat.x holds the estimate half of the time
        self._kept: list[torch.Tensor] | None = None  # S~
        self._kept_tokens = 0.0
        self._kept_from = (0, 0)  # numbers of its round, here and in the stream
        self._committed = 0  # tokens that the driver has committed; the loop counts them later
        self._kind = TENTATIVE
        self._half: Half | None = None
        return model

    def applied_at(self) -> int:
        # The gradients of a tentative half are committed after the two halves that still travel.
        late = self._kind == TENTATIVE and self._half is not None
        return self.tokens + self.nominal * (2 if late else 1)

    # ------------------------------------------------------------------ when a half ends
    def feed(self, stream: Rounded) -> Iterator[Batch]:
        return self._feed_timed(cast(Stream, stream)) if self.settings.timed else super().feed(stream)

    def _feed_timed(self, stream: Stream) -> Iterator[Batch]:
        share = self.nominal // (2 * self.world.size)  # no half ends before: an update has a nominal batch at least
        lane = stream.lane(self.world.rank, self.world.size, share)
        while True:
            self.begin()
            tokens = count = 0
            last = False
            while not last:
                batch = next(lane)
                if self.device.type == "cuda" and count > 0:
                    # The host runs ahead of the device: without this a half would end before it is computed.
                    wait_for_stream(self.device)
                count, tokens = count + 1, tokens + batch.tokens
                enough = count >= self.settings.least and tokens >= share
                last = enough and (self._half is None or self._half.driven.landed())
                last = last or count == self.settings.most
                batch.last = last
                if last:
                    self.announce(tokens)
                self.arm(batch)
                yield batch

    def end_round(self, flights: list[Flight]) -> Commit | None:
        before, kind, now = self._half, self._kind, self.now
        launched, meta = now.flies, now.meta
        assert meta is not None
        heard = None if self.settings.timed else self.hear()

        def travel() -> Arrived:
            said = meta.land() if heard is None else heard
            sums = [flight.land() for flight in flights]
            return self._finish(sums, said.tokens, kind, launched, said if heard is None else None)

        self._half = Half(kind, self.tally.round, now.stream, self.world.drive(travel))
        self._kind = 1 - kind
        arrived = before.driven.land() if before is not None else None
        landed = Mark(self.device)
        self.flat.flip()
        commit = None
        if before is not None and arrived is not None:
            self._take(before, arrived)
        self.flat.g.zero_()
        self.computed([(now.wait, landed)], [arrived.flight] if arrived is not None else [])
        if before is not None and arrived is not None:
            if before.kind == COMMIT:
                commit = self._commit(before, arrived)
            else:
                self._kept_from = (before.round, before.stream)
        return commit

    # ------------------------------------------------------------------ on the driver
    def _finish(
        self, sums: list[torch.Tensor], tokens: float, kind: int, launched: Mark, meta: MetaSum | None
    ) -> Arrived:
        step = None
        if kind == TENTATIVE:
            self._kept, self._kept_tokens = [each.clone() for each in sums], tokens
            weights = self._peek()
        else:
            assert self._kept is not None
            torch._foreach_add_(sums, self._kept)
            tokens += self._kept_tokens
            self._committed += int(tokens)
            step = self.update.step(self.theta, sums, Divisor(tokens, self._committed), self.total)
            weights = self.theta
        spread = [flight.land() for flight in self.spread(weights)]
        return Arrived(spread, tokens, step, meta, (launched, Mark(self.device)))

    def _peek(self) -> list[torch.Tensor]:
        assert self._kept is not None
        divisor = Divisor(self._kept_tokens, self._committed + int(self._kept_tokens))
        return self.update.peek(self.theta, self._kept, divisor, self.total)

    # ------------------------------------------------------------------ in the loop
    def _take(self, half: Half, arrived: Arrived) -> None:
        for bucket, weights in zip(self.flat.buckets, arrived.weights, strict=True):
            self.flat.x[bucket.span.start : bucket.span.stop].copy_(weights)
        self._listen(half, arrived)

    def _listen(self, half: Half, arrived: Arrived) -> None:
        """Books, once, the meta that the driver has landed."""
        if arrived.meta is not None:
            self.tally.hear(arrived.meta, half.round)
            arrived.meta = None

    def _commit(self, half: Half, arrived: Arrived) -> Commit:
        assert arrived.step is not None
        lr, norm = arrived.step
        rounds, streams = zip(self._kept_from, (half.round, half.stream), strict=True)
        again = [] if self.settings.timed else list(streams)  # a lane cannot be dealt again
        return self.commit(arrived.tokens, lr, norm, list(rounds), again, left=True)

    def land(self) -> None:
        if self._half is not None:
            self._listen(self._half, self._half.driven.land())
        super().land()

    def rest(self) -> Settled | None:
        half = self._half
        if half is None:
            return None
        self._half, self._kind = None, TENTATIVE
        if half.kind == COMMIT:  # a stream on which nothing arrives was asked to stop between two rounds
            arrived = half.driven.land()
            self._take(half, arrived)
            report = self.report()
            self._commit(half, arrived)
            return Settled(report, int(arrived.tokens))
        # At a mark it is always a tentative half that travels. Its tokens get a commit of their own.
        assert self._kept is not None
        report = self.report()
        tokens, self._committed = self._kept_tokens, self._committed + int(self._kept_tokens)
        _, norm = self.update.step(self.theta, self._kept, Divisor(tokens, self._committed), self.total)
        self.collect(self.spread(self.theta))
        self.commit(tokens, 0.0, norm, [half.round], [half.stream], left=True)
        return Settled(report, int(tokens))

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        state = super().state()
        estimate = state.sharded["model"]
        state.sharded["model"] = torch.cat(self.theta)
        half = self._half
        if half is not None and half.kind == COMMIT:  # see rest()
            arrived: Arrived = half.driven.land()
            assert arrived.step is not None
            lr, norm = arrived.step
            state.shared["committed"] = [arrived.tokens, lr, norm.read()[0], *self._kept_from, half.round, half.stream]
            state.sharded["estimate"] = estimate
        elif half is not None and self._kept is not None:
            state.shared["kept"] = [self._kept_tokens, half.round, half.stream]
            state.sharded["kept"] = torch.cat(self._kept)
        return state

    def load(self, state: State, mine: list[Values]) -> None:
        super().load(state, mine)
        self._committed = self.tokens
        torch._foreach_copy_(self.theta, self.pieces)
        now = Mark(self.device)
        if "committed" in state.shared:
            tokens, lr, norm, *kept_from, round, stream = state.shared["committed"]
            self._committed, self._kept_from = self.tokens + int(tokens), (kept_from[0], kept_from[1])

            def landed() -> Arrived:
                weights = [flight.land() for flight in self.spread(self.theta)]
                return Arrived(weights, tokens, (lr, Later(torch.tensor(norm))), None, (now, Mark(self.device)))

            self._half, self._kind = Half(COMMIT, round, stream, self.world.drive(landed)), TENTATIVE
            self.flat.x.copy_(state.sharded["estimate"])
            return
        if "kept" not in state.shared:
            return
        self._kept_tokens, round, stream = state.shared["kept"]
        self._kept = [piece.to(self.device, copy=True) for piece in self.slices_of(state.sharded["kept"])]

        def again() -> Arrived:  # a checkpoint has no estimate: it is computed anew
            weights = [flight.land() for flight in self.spread(self._peek())]
            return Arrived(weights, self._kept_tokens, None, None, (now, Mark(self.device)))

        self._half, self._kind = Half(TENTATIVE, round, stream, self.world.drive(again)), COMMIT
