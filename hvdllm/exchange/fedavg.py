"""Federated averaging: clients with text of their own, and a server (McMahan et al., 2016, arXiv 1602.05629).

client   the owner of whole documents; n_k are the tokens of its text round    the drawn clients are dealt to the groups
(a rank each, or several with `inner`), and a group trains its clients
         one after the other. Who is drawn, and what each client reads, is a function of seed and round, the same for
         any world

    each drawn client k:   x = anchor, a fresh optimizer;  H times  x = Update(x, g + μ (x - anchor));  x_k = x
    d = sum n_k (anchor - x_k) / sum n_k                              # over the drawn ones
    server=sgd:    u = m u + d;  anchor = anchor - γ (d + m u)        # γ = 1, m = 0: the mean of the x_k
    server=adam:   a = β1 a + (1-β1) d;  v = β2 v + (1-β2) d²;  anchor = anchor - γ a / (sqrt(v) + τ);  v_0 = τ²

The server's rule is that of FedOpt (Reddi et al., 2020, arXiv 2003.00295, algorithm 2). μ (prox) is that of FedProx (Li
et al., 2018, arXiv 1812.06127): its term is added to the gradient before norm, clipping and moments, and keeps a client
near the anchor.

Invariant: with one client a rank, H = 1, plain descent and γ = 1 it is synchronous descent, with gradients weighted by
text. The weights are by text and not by the tokens of a step, of which all clients have as many. The learning rate of a
step is that of the tokens at the last meeting and, since then, of the client's own tokens times the number of drawn
clients, so it does not depend on the ranks.

Where clients differ in curvature λ_k, the fixed point (γ > 0, any H) is not the optimum but
sum n_k q_k x*_k / sum n_k q_k with q_k = 1 - (1 - ηλ_k)^H: the clients with the largest curvature count most. With μ,
λ_k becomes λ_k + μ in the power, and q_k is multiplied by λ_k / (λ_k + μ).

Stability: inside a client η (λ + μ) < 2; the server's sgd is stable as DiLoCo's outer step.

Marks, pulses, consensus (the anchor) and settling are those of local_rounds.py. Where a round is settled early, clients
count by FedNova's normalisation, and those that made no step do not count. A checkpoint in the middle of a round goes
on bit-equal at the same world size; at another one that round begins anew, with the same clients and the same text.

Bytes a group and round: 2 (N-1)/N P b, however many clients it has, and a meta for each pulse. Memory: the anchor and a
sum of deltas, 2 P, and up to 2 P of the server. Groups wait for each other where the clients do not divide by them.

More in hvdllm/exchange/README.md, `fedavg`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.anchor import Anchor, Fragment, Sent
from hvdllm.exchange.base import Divisor, Federation, Rounded, State, Stream, Total, Update, Values, Wire
from hvdllm.exchange.group import LocalGroup
from hvdllm.exchange.local import LocalSteps, Meetings, Replica
from hvdllm.exchange.local_rounds import Together
from hvdllm.exchange.meta import MetaSum
from hvdllm.exchange.outer import FedAdam, Mean, Nesterov, Outer
from hvdllm.flat import Flat, Span
from hvdllm.tables import RowSums
from hvdllm.world.base import World


class Proximal:
    """An update whose gradients are pulled towards an anchor: G + μ n (x - anchor), for the sum G over n tokens."""

    anchor: torch.Tensor  # over the flat vector; it is given once there is one

    def __init__(self, update: Update, mu: float) -> None:
        self.update, self.mu = update, mu

    def __getattr__(self, name: str) -> Any:
        return getattr(self.update, name)

    def attach(self, flat: Flat, pieces: list[Span]) -> None:
        self.spans = pieces
        self.update.attach(flat, pieces)

    def step(
        self, pieces: list[torch.Tensor], grad: list[torch.Tensor], meta: Divisor, total: Total, share: float = 1.0,
        rows: Sequence[RowSums] = (),
    ) -> Any:  # fmt: skip
        for x, g, span in zip(pieces, grad, self.spans, strict=True):
            g.add_(x - self.anchor[span.start : span.stop], alpha=self.mu * meta.tokens)
        return self.update.step(pieces, grad, meta, total, share, rows)


class ClientRounds:
    """Who is trained by whom, and when: the pace of the rounds (local_rounds.py).

    round: number of this one; turns: the rounds that each client has been through
    texts: tokens of each client's text
    drawn, own: the clients of this round, and those of them that this group trains
    """

    federation: Federation

    def __init__(self, settings: exchanges.FedAvg, group: LocalGroup) -> None:
        self.settings, self.group = settings, group
        self.planned = [settings.local_steps] * group.count
        self.round = 0
        self.turns = [0] * settings.clients
        self.texts = [0] * settings.clients
        self.drawn: list[int] = []
        self.own: list[int] = []

    def of(self, federation: Federation) -> None:
        self.federation, self.texts = federation, federation.tokens
        self._draw()
        self.group.replicas = len(self.drawn)

    def _draw(self) -> None:
        self.set_drawn(self.federation.sample(self.round, self.settings.sampled))

    def set_drawn(self, clients: list[int]) -> None:
        self.drawn, self.own = clients, clients[self.group.number :: self.group.count]

    def plan(self, done: int) -> Iterator[tuple[int, int]]:
        """Client and number of its step, for each step of this group from here on; what may be read ahead. done: steps
        of this round that were made already."""
        turns, steps, group, round = list(self.turns), self.settings.local_steps, self.group, self.round
        while True:
            drawn = self.federation.sample(round, self.settings.sampled)
            for place in range(done, len(drawn[group.number :: group.count]) * steps):
                client = drawn[group.number + place // steps * group.count]
                yield client, turns[client] * steps + place % steps
            for client in drawn:
                turns[client] += 1
            round, done = round + 1, 0

    def weight(self) -> int:
        """Tokens of the text of all drawn clients."""
        return sum(self.texts[client] for client in self.drawn)

    # ------------------------------------------------------------------ the pace
    def pulses(self) -> int:
        every, replicas, groups = self.settings.local_steps, self.group.replicas, self.group.count
        wanted = self.settings.pulses or round(-(-replicas // groups) * every / 10)
        return max(1, min(wanted, max(1, replicas // groups) * every))

    def steps(self) -> int:
        """What the clients of this group make together."""
        return len(self.own) * self.settings.local_steps

    def own_steps(self) -> int:
        """A group without a client waits for as many steps as there are pulses."""
        return max(self.pulses(), self.steps())

    def next_round(self, compute_s: list[float]) -> None:
        for client in self.drawn:
            self.turns[client] += 1
        self.round += 1
        self._draw()


class Gathered(Anchor):
    """An anchor whose buffer gathers what one client after the other has made, while the next one is trained. All drawn
    clients together have the weight of a batch's tokens, since a wire expects the size of a sum of gradients."""

    clients: ClientRounds

    def gather(self, fragment: Fragment, steps: int) -> None:
        """Adds what the client that is being trained has made in so many steps."""
        every = self.settings.local_steps
        client = self.clients.own[(fragment.steps - 1) // every]
        factor = self.clients.texts[client] * self.nominal / self.clients.weight()
        for bucket in fragment.buckets:
            span = slice(bucket.span.start, bucket.span.stop)
            x = self.flat.x[span]
            made = self.x[span].to(x.device, non_blocking=True) - x
            self.buffer[span].add_(made, alpha=factor * every / steps)

    def launch(self, fragment: Fragment, committed: int) -> Sent:
        every, tokens = self.settings.local_steps, [self.clients.texts[client] for client in self.clients.own]
        whole, begun = divmod(min(fragment.steps, self.clients.steps()), every)
        if begun:  # the round is settled early
            self.gather(fragment, begun)
        weight = sum(tokens[: whole + (begun > 0)])
        steps = sum(tokens[:whole]) * every + (tokens[whole] * begun if begun else 0)
        return self.send(fragment, committed, float(weight), float(steps))

    def scale(self, meta: MetaSum) -> float:
        return super().scale(meta) * self.clients.weight() / self.nominal


class FedAvg(LocalSteps[exchanges.FedAvg]):
    resized = "the round that they were in begins anew, with the same clients and the same text"

    def __init__(self, settings: exchanges.FedAvg, nominal: int) -> None:
        rate, momentum = float(settings.rate), settings.outer_momentum
        outer: Outer = Nesterov(rate, momentum) if momentum else Mean(rate)
        if settings.server == "adam":
            outer = FedAdam(rate, settings.beta1, settings.beta2, settings.tau)
        super().__init__(settings, nominal, outer)

    def between(self, world: World) -> World:
        across = super().between(world)
        self.group.replicas = self.settings.sampled or self.settings.clients
        self.clients = ClientRounds(self.settings, self.group)
        return across

    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        pulled: Any = Proximal(update, self.settings.prox)
        module = super().attach(model, flat, pulled if pulled.mu else update, wire, world)
        pulled.anchor = self.anchor.x
        self._clean = self.group.inner.wire.state()[0]
        return module

    def anchored_at(self, flat: Flat, wire: Wire) -> Anchor:
        self.gathered = Gathered(self.settings, self.nominal, self.outer, flat, wire)
        self.gathered.clients = self.clients
        return self.gathered

    def arrange(self, replica: Replica) -> Meetings:
        return Together(replica, self.clients)

    # ------------------------------------------------------------------ one client after the other
    def text(self, stream: Stream) -> Rounded:
        federation, inside = stream.clients(self.settings.clients, self.settings.alpha), self.group.inside
        self.clients.of(federation)
        plan = self.clients.plan(self.fragments[0].steps)
        return federation.walk(plan, self.group.replicas, inside.rank, inside.size)

    def trains(self) -> bool:
        return super().trains() and self.fragments[0].steps < self.clients.steps()

    def after_step(self) -> None:
        """The next client begins with the anchor, and with nothing of the one before but the mask of a bad gradient."""
        whole, every = self.fragments[0], self.settings.local_steps
        if not self.clients.own or whole.steps % every:
            return
        self.gathered.gather(whole, every)
        self.flat.x.copy_(self.anchor.x)
        self.group.open = 0
        self.group.inner.update.fresh()
        self.group.inner.wire.load(self._clean, {}, {})

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        state, clients = super().state(), self.clients
        state.shared |= {
            "turns": clients.turns, "texts": clients.texts, "drawn": clients.drawn, "round": clients.round,
        }  # fmt: skip
        if self.fragments[0].steps >= self.settings.local_steps:
            state.local["made"] = (self.flat.pieces(0, 1), self.anchor.buffer)
        return state

    def load(self, state: State, mine: list[Values]) -> None:
        super().load(state, mine)
        clients, shared = self.clients, state.shared
        clients.round, clients.turns, clients.texts = shared["round"], list(shared["turns"]), shared["texts"]
        clients.set_drawn(shared["drawn"])
        if "made" in state.local:
            self.anchor.buffer.copy_(state.local["made"])
