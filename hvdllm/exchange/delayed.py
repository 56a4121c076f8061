"""One update late: the sum of one round travels while the next round is computed (DPU of ZeRO-Offload, arXiv
2101.06840, section 5.2).

Invariant: x_{t+1} = Update(x_t, G_{t-1} / n_{t-1}), where G_{t-1} was taken at x_{t-1}, so the staleness is exactly 1.
All replicas are bit-equal at every commit. A step takes max(compute, communication).

    warm-up: synchronous updates until warmup_tokens are committed; the next round's sum is kept and nothing applied
    then:    launch G_t;  land G_{t-1};  x = Update(x, G_{t-1} / n_{t-1});  compute the next round

Stability: on f = λx²/2 plain descent of rate η with delay d is stable for 0 < ηλ < 2 sin(π / (2 (2d+1))), which is 2
for d = 0 but 1 for d = 1. Momentum loses its gain: with μ = .9 the bound falls from 3.8 to .100 (= 1 - μ), with .5 from
3.0 to .5. What counts is therefore the rate over (1 - μ): take a lower rate or a lower momentum when updates are late.
AdamW does not diverge; it circles at about 1.2 to 1.5 times the rate and settles as the schedule falls. Nesterov's
method for delay helps (optim=nadam, or optim=sgd optim.nesterov=true optim.momentum=.99; arXiv 2505.01099): it allows
ηλ up to 2.53 at μ = .9 and 9.14 at .99, where η = rate / (1 - μ).

compensation λ (DC-ASGD, Zheng et al., 2017, arXiv 1609.08326): G += λ G*G*(x - x_then) takes the first order of the
delay back, with G*G/n in the place of the mean loss's Hessian. It costs a copy of the weights.

State: a second gradient vector; the sum that travels, which a checkpoint has landed and not applied; with compensation,
the weights that the sum was taken at. Bytes: as all-reduce.

More in hvdllm/exchange/README.md, `delayed`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from hvdllm.device import Later, Mark
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Commit, Settled, State, Update, Values, Wire
from hvdllm.exchange.rounds import Rounds
from hvdllm.exchange.tally import Interval
from hvdllm.flat import Flat
from hvdllm.settings import warmed_up
from hvdllm.world.base import Flight, World
from hvdllm.world.single import Landed


@dataclass
class Flying:
    """A sum that travels or has landed, and is not applied yet.

    driven: lands the interval of its journey
    round, stream: the numbers of its round, here and in the stream
    """

    driven: Flight
    tokens: float
    round: int
    stream: int


class Delayed(Rounds[exchanges.Delayed]):
    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        model = super().attach(model, flat, update, wire, world)
        self.gradients = [self.slices_of(g) for g in flat.gradients]
        self._flying: Flying | None = None
        self._then = (
            torch.zeros_like(flat.x) if self.settings.compensation else None
        )  # the weights that it was taken at
        self.noisy = self.noisy and self._then is None  # else the norm is not that of a mean gradient
        return model

    def applied_at(self) -> int:
        return self.tokens + self.nominal * (1 if self._flying is None else 2)

    def end_round(self, flights: list[Flight]) -> Commit | None:
        launched, wait = self.now.flies, self.now.wait

        def journey() -> Interval:
            for flight in flights:
                flight.land()
            return launched, Mark(self.device)

        if self._flying is None and self.tokens < warmed_up(self.settings.warmup_tokens, self.nominal):
            interval = journey()
            meta = self.hear()
            landed = Mark(self.device)
            lr, norm = self._apply(meta.tokens)
            self.computed([(wait, landed)], [interval])
            return self.commit(meta.tokens, lr, norm, [self.tally.round], [self.now.stream])

        driven = self.world.drive(journey)  # round t is on its way before t - 1 is applied
        before = self._flying
        intervals = [before.driven.land()] if before is not None else []
        meta = self.hear()
        landed = Mark(self.device)
        self._flying = Flying(driven, meta.tokens, self.tally.round, self.now.stream)
        self.flat.flip()
        if before is None:
            self._skip()
            self.computed([(wait, landed)], intervals)
            return None
        lr, norm = self._apply(before.tokens)
        self.computed([(wait, landed)], intervals)
        return self.commit(before.tokens, lr, norm, [before.round], [before.stream], staleness=1.0, left=True)

    def _apply(self, tokens: float) -> tuple[float, Later]:
        """Steps with the current gradient vector, which is zero afterwards."""
        if self._then is not None:
            if self._flying is not None:
                # addcmul_ would need the product first: G (1 + λ G (x - x_then)), in two passes
                moved = (self.flat.x - self._then).mul_(self.flat.g).mul_(self.settings.compensation)
                self.flat.g.addcmul_(self.flat.g, moved)
            self._then.copy_(self.flat.x)
        done = self.update.step(self.pieces, self.gradients[self.flat.current], self.divisor(tokens), self.total)
        self.flat.g.zero_()
        return done

    def _skip(self) -> None:
        """Leaves out the one update for which there is no sum yet when the delay begins."""
        if self._then is not None:
            self._then.copy_(self.flat.x)

    def land(self) -> None:
        if self._flying is not None:
            self._flying.driven.land()
        super().land()

    def rest(self) -> Settled | None:
        if self._flying is None:
            return None
        report, tokens = self.report(), self._flying.tokens
        self.flat.flip()
        _, norm = self._apply(tokens)
        self.commit(tokens, 0.0, norm, [self._flying.round], [self._flying.stream], left=True)
        self._flying = None
        return Settled(report, int(tokens))

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        state = super().state()
        flying = self._flying
        if flying is not None:
            state.shared["flying"] = [flying.tokens, flying.round, flying.stream]
            state.sharded["flying"] = self.flat.gradients[1 - self.flat.current]
            if self._then is not None:
                state.sharded["then"] = self._then
        return state

    def load(self, state: State, mine: list[Values]) -> None:
        super().load(state, mine)
        if "flying" not in state.shared:
            return
        tokens, round, stream = state.shared["flying"]
        now = Mark(self.device)
        self._flying = Flying(Landed((now, now)), tokens, round, stream)
        self.flat.gradients[1 - self.flat.current].copy_(state.sharded["flying"])
        if self._then is not None:
            self._then.copy_(state.sharded["then"])
