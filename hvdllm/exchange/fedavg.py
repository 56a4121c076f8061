"""Federated averaging: clients with text of their own, and a server (McMahan et al., 2016, arXiv 1602.05629).

client   owner of whole documents; n_k: tokens of its text
round    the drawn clients, dealt to the groups (a rank each, or several: `inner`), which train theirs one after the
         other. Who is drawn, and what each then reads, is a function of seed and round: the same for any world

    each drawn client k:   x = anchor, a fresh optimizer;  H times  x = Update(x, g + μ (x - anchor));  x_k = x
    d = sum n_k (anchor - x_k) / sum n_k                              # over the drawn ones
    server=sgd:    u = m u + d;  anchor = anchor - γ (d + m u)        # γ = 1, m = 0: the mean of the x_k
    server=adam:   a = β1 a + (1-β1) d;  v = β2 v + (1-β2) d²;  anchor = anchor - γ a / (sqrt(v) + τ);  v_0 = τ²

The server's rule is FedOpt's (Reddi et al., 2020, arXiv 2003.00295, algorithm 2); μ (prox) is FedProx (Li et al., 2018,
arXiv 1812.06127): it goes into the gradient before norm, clipping and moments, and keeps a client near the anchor.

Invariant: one client a rank, H = 1, plain descent and γ = 1 are synchronous descent, with gradients weighted by text.
Weights are by text, not by tokens of a step, which all clients have alike. A step's rate is that of the tokens at the
last meeting and, since then, the client's own times the number of clients drawn: it does not depend on the ranks.

Where clients differ in curvature λ_k the fixed point (γ > 0, any H) is sum n_k q_k x*_k / sum n_k q_k with
q_k = 1 - (1 - ηλ_k)^H, not the optimum: those that curve most are heard most. With μ, λ_k becomes λ_k + μ in the power
and q_k is weighed by λ_k / (λ_k + μ). Stability: inside η (λ + μ) < 2; the server's sgd as DiLoCo's.

Marks, pulses, consensus (the anchor) and settling are those of local_rounds.py; where a round is settled early, clients
count by FedNova's normalisation and those that made no step not at all. A checkpoint in mid-round goes on bit-equal at
the same world size; at another one that round begins anew, with the same clients and the same text.

Bytes a group and round: 2 (N-1)/N P b, however many its clients are, and meta for each pulse. Memory: the anchor and a
sum of deltas, 2 P, and up to 2 P of the server. Groups wait for each other where the clients do not divide by them.
More in hvdllm/exchange/README.md, `fedavg`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hvdllm.exchange import outer
from hvdllm.exchange.base import Commit, Meta, Rounded, State, Stream, Update, Wire
from hvdllm.exchange.local import Fragment
from hvdllm.exchange.local_rounds import LocalRounds
from hvdllm.exchange.meta import MetaSum
from hvdllm.world.base import Flight, World


class Proximal:
    """An update whose gradients are pulled towards an anchor: G + μ n (x - anchor), for the sum G over n tokens."""

    def __init__(self, update: Update, mu: float) -> None:
        self.update, self.mu = update, mu
        self.anchor: torch.Tensor  # over the map; given once there is one

    def __getattr__(self, name: str) -> Any:
        return getattr(self.update, name)

    def attach(self, flat: Any, pieces: list[Any]) -> None:
        self.spans = pieces
        self.update.attach(flat, pieces)

    def step(self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Meta, total: Any) -> Any:
        for x, g, span in zip(pieces, grad, self.spans, strict=True):
            g.add_(x - self.anchor[span.start : span.stop], alpha=self.mu * meta.tokens)
        return self.update.step(pieces, grad, meta, total)


class FedAvg(LocalRounds):
    copies = 2  # what clients have made adds up in one gradient vector while the next is trained in the other
    resized = "the round that they were in begins anew, with the same clients and the same text"

    def __init__(self, settings: Any, nominal: int) -> None:
        super().__init__(settings, nominal)
        self._round = 0
        self._turns = [0] * settings.clients  # rounds that each client has been through
        self._texts = [0] * settings.clients  # tokens of each
        self._drawn: list[int] = []  # of this round
        self._own: list[int] = []  # and those of them that this group trains

    # ------------------------------------------------------------------ who trains whom
    def between(self, world: World) -> World:
        over = super().between(world)
        self.replicas = self.settings.sampled or self.settings.clients
        return over

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        pulled: Any = Proximal(update, self.settings.prox)
        module = super().attach(model, flat, pulled if pulled.mu else update, wire, world)
        pulled.anchor = self.anchor
        self._clean = self.inner.wire.state()[0]
        return module

    def text(self, stream: Stream) -> Rounded:
        self._clients = stream.clients(self.settings.clients, self.settings.alpha)
        self._texts = self._clients.tokens
        if self._round == 0 and self.settings.server == "adam":
            self.outer["v"].fill_(self.settings.tau**2)
        self._draw(self._clients.sample(self._round, self.settings.sampled))
        self.replicas = len(self._drawn)
        return self._clients.walk(self._plan(), self.replicas, self.inside.rank, self.inside.size)

    def _draw(self, clients: list[int]) -> None:
        self._drawn, self._own = clients, clients[self.group :: self.groups]

    def _plan(self) -> Iterator[tuple[int, int]]:
        """Client and number of its step, of each step of this group from here on: what may be read ahead."""
        turns, steps, done = list(self._turns), self.settings.local_steps, self.fragments[0].steps
        round = self._round
        while True:
            drawn = self._clients.sample(round, self.settings.sampled)
            for place in range(done, len(drawn[self.group :: self.groups]) * steps):
                client = drawn[self.group + place // steps * self.groups]
                yield client, turns[client] * steps + place % steps
            for client in drawn:
                turns[client] += 1
            round, done = round + 1, 0

    def pulses(self) -> int:
        every, least = self.settings.local_steps, max(1, self.replicas // self.groups)
        wanted = self.settings.pulses or round(-(-self.replicas // self.groups) * every / 10)
        return max(1, min(wanted, least * every))

    def own_steps(self) -> int:
        """A group without a client waits for as many steps as there are pulses."""
        return max(self.pulses(), len(self._own) * self.settings.local_steps)

    def trains(self) -> bool:
        return super().trains() and self.fragments[0].steps < len(self._own) * self.settings.local_steps

    # ------------------------------------------------------------------ a client's end
    def synchronise(self) -> Commit | None:
        done = self.fragments[0].steps
        if self._own and done % self.settings.local_steps == 0:
            self._gather(self.settings.local_steps)
            self.flat.x.copy_(self.anchor)
            self._begin_client()
        return super().synchronise()

    def _gather(self, steps: int) -> None:
        """Adds to the buffer what the client that is trained has made in so many steps. All drawn ones together have
        the weight of a batch's tokens, as a wire expects a sum of gradients to have."""
        client = self._own[(self.fragments[0].steps - 1) // self.settings.local_steps]
        factor = self._texts[client] * self.nominal / self._weight()
        for bucket in self.flat.buckets:
            span = slice(bucket.span.start, bucket.span.stop)
            x = self.flat.x[span]
            made = self.anchor[span].to(x.device, non_blocking=True) - x
            self.buffer[span].add_(made, alpha=factor * self.settings.local_steps / steps)

    def _weight(self) -> int:
        """Of the drawn clients: tokens of their text."""
        return sum(self._texts[client] for client in self._drawn)

    def _begin_client(self) -> None:
        """With nothing of the one before but the mask of a bad number."""
        self._open = 0
        self.update.fresh()
        self.inner.wire.load(self._clean, {}, {})

    # ------------------------------------------------------------------ meetings
    def launch(self, fragment: Fragment) -> tuple[list[Flight], float, float]:
        every, tokens = self.settings.local_steps, [self._texts[client] for client in self._own]
        whole, begun = divmod(min(fragment.steps, len(self._own) * every), every)
        if begun:  # the round is settled early
            self._gather(begun)
        weight = sum(tokens[: whole + (begun > 0)])
        steps = sum(tokens[:whole]) * every + (tokens[whole] * begun if begun else 0)
        self.wire.begin(self.tokens, self.outer_rate() / self.nominal)
        flights = []
        for bucket in reversed(fragment.buckets):
            flights.append(self.wire.sum(self.buffer[bucket.span.start : bucket.span.stop], f"grad.{bucket.index}"))
        fragment.tokens = fragment.steps = 0
        return flights, float(weight), float(steps)

    def scale(self, meta: MetaSum) -> float:
        return super().scale(meta) * self._weight() / self.nominal

    def _set_pace(self) -> None:
        """The next round."""
        super()._set_pace()
        for client in self._drawn:
            self._turns[client] += 1
        self._round += 1
        self._draw(self._clients.sample(self._round, self.settings.sampled))

    # ------------------------------------------------------------------ the server
    def outer_vectors(self) -> tuple[str, ...]:
        if self.settings.server == "adam":
            return ("m", "v")
        return ("velocity",) if self.settings.outer_momentum else ()

    def outer_rate(self) -> float:
        return float(self.settings.rate)

    def outer_step(self, anchor: torch.Tensor, delta: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        s = self.settings
        if s.server == "adam":
            outer.adam(anchor, delta, state["m"], state["v"], lr=s.rate, beta1=s.beta1, beta2=s.beta2, tau=s.tau)
        elif s.outer_momentum:
            outer.nesterov(anchor, delta, state["velocity"], lr=s.rate, momentum=s.outer_momentum)
        else:
            anchor.sub_(delta, alpha=s.rate)

    # ------------------------------------------------------------------ checkpoint
    def values(self) -> dict[str, Any]:
        clients = {"turns": self._turns, "texts": self._texts, "drawn": self._drawn}
        return {**super().values(), "round": self._round, **clients}

    def state(self) -> State:
        state = super().state()
        if self.fragments[0].steps >= self.settings.local_steps:
            state.local["made"] = (self.flat.pieces(0, 1), self.buffer)
        return state

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        super().load(state, mine)
        shared = state.shared
        self._round, self._turns, self._texts = shared["round"], list(shared["turns"]), shared["texts"]
        self._draw(shared["drawn"])
        if "made" in state.local:
            self.buffer.copy_(state.local["made"])
