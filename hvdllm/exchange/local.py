"""What exchanges with local steps have in common: groups of ranks train on their own and meet now and then.

group     ranks that are one replica (group.py)
step      one update of a group, by its inner exchange, on its own text
anchor    the weights that all groups shared last (anchor.py). They are what a user would keep and what evaluation sees
round     the local steps from one meeting to the next
pulse     a meta of all ranks and nothing else, in the middle of a round. It is posted at one pulse and heard at the
          next, so that nobody waits for what has just been posted. Pulses make tokens exact, asks heard and logs
          possible between meetings; how many there are changes no weight
mark      a pulse that was heard

    each group:  `local_steps` times  x = Update(x, g)       # own moments, never reset or averaged; clipping is local
    meeting:     d = mean of (anchor - x);  anchor = Outer(anchor, d);  x = anchor

An exchange of this kind is put together from an outer optimizer (outer.py) and its meetings: all of the model at once
(local_rounds.py) or one part after the other (streaming_diloco.py).

A local step whose gradient is not finite is masked, and so are those after it. Only its own group can see it, so the
group's next pulse says so, and all ranks stop at the same mark.

A checkpoint has the anchor and the state of the outer optimizer once, and of each rank its own weights, moments and
clocks. At another world size all ranks begin with the anchor.

More in hvdllm/exchange/README.md, "Local steps".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import nn

from hvdllm.device import Mark, wait_for_stream
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.anchor import Anchor, Fragment, Sent
from hvdllm.exchange.base import (
    Batch,
    Commit,
    NotFinite,
    Nothing,
    Report,
    Rounded,
    Settled,
    State,
    Stream,
    Update,
    Values,
    Wire,
)  # fmt: skip
from hvdllm.exchange.common import Common
from hvdllm.exchange.group import LocalGroup
from hvdllm.exchange.meta import MetaPost, Metas, MetaSum
from hvdllm.exchange.outer import Outer
from hvdllm.exchange.tally import Heard, RankReport, Tally
from hvdllm.flat import Flat
from hvdllm.world.base import Asks, World
from hvdllm.world.single import Landed

L = TypeVar("L", bound=exchanges.LocalSteps)


@dataclass
class Pulse:
    """A pulse on its way. meeting: it was posted where a round ended."""

    meta: MetaPost | Landed
    meeting: bool

    @staticmethod
    def arrived(values: Values, meeting: bool) -> Pulse:
        """One that has arrived, from the plain values of a checkpoint."""
        return Pulse(Landed(MetaSum.of(values)), meeting)


@dataclass
class Replica:
    """What meetings work with: this rank's group, the anchor, and what ranks tell each other."""

    tally: Tally
    group: LocalGroup
    anchor: Anchor
    update: Update
    world: World  # of the ranks that meet
    fragments: list[Fragment]
    metas: Metas = field(init=False)

    def __post_init__(self) -> None:
        self.metas = Metas(self.world)

    @property
    def device(self) -> torch.device:
        return self.anchor.flat.x.device

    # ------------------------------------------------------------------ pulses
    def post(self, meeting: bool = False, sent: Sent | None = None) -> Pulse:
        """Posts what this rank has to tell. sent: the deltas that travel with it."""
        self.group.land()
        self.tally.read_seconds()
        own, self.tally.own = self.tally.own, RankReport()
        asks = self.tally.take_asks()
        values = {"loss": own.loss, "loss_tokens": own.loss_tokens}
        values |= {"stop": float(asks.stop), "save": float(asks.save), "bad": float(self.group.bad is not None)}
        if self.group.inside.rank == 0:  # it speaks for the whole group
            values |= {"tokens": float(own.tokens), "squares": own.squares}
            if sent is not None:
                values |= {"weight": sent.weight, "steps": sent.steps}
        return Pulse(self.metas.post(values, own.slot()), meeting)

    def hear(self, pulse: Pulse) -> MetaSum:
        """Lands it. Raises NotFinite, on every rank, where any group has masked a step."""
        meta: MetaSum = pulse.meta.land()
        if meta.bad:
            raise self._not_finite()
        return meta

    def land(self) -> None:
        """Lands, without applying, what flies. Raises NotFinite, on every rank. Collective."""
        self.group.land()
        bad = torch.tensor([float(self.group.bad is not None)], dtype=torch.float64)
        if self.world.sum(bad, "act.bad").land().item():
            raise self._not_finite()

    def _not_finite(self) -> NotFinite:
        bad = self.group.bad
        rounds, norm = (bad.rounds, bad.norm) if bad is not None else ([], math.nan)
        return NotFinite(self.tally.step + 1, rounds, norm, left=True, stream=self.group.text, again=True)

    def commit(self, *metas: MetaSum, staleness: float = 0.0) -> Commit:
        """A mark, at which these metas were heard."""
        tokens = sum(int(meta.tokens) for meta in metas)
        # Not the rate of the last local step, which may be far beyond the pulse whose tokens these are.
        lr = self.update.rate(self.tally.tokens + tokens)
        asks = Asks(any(meta.asks.stop for meta in metas), any(meta.asks.save for meta in metas))
        return self.tally.commit(tokens, lr, self.report(*metas), asks, staleness)

    def report(self, *metas: MetaSum) -> Report:
        norm = math.sqrt(metas[-1].squares / self.group.count)  # root mean square of the groups' own norms
        return sum(map(Heard.of, metas), Heard()).report(norm, self.world.size)

    # ------------------------------------------------------------------ meetings
    def send(self, fragment: Fragment) -> Sent:
        return self.anchor.launch(fragment, self.tally.tokens)

    def stood_still(self, since: Mark, launched: Mark) -> None:
        """Compute has stood still since then, for what was launched then."""
        if self.world.size > 1:
            now = Mark(self.device)
            self.tally.passed("blocked", since, now)
            self.tally.passed("flight", launched, now)


class Meetings(Protocol):
    """When pulses are posted and when groups meet."""

    def stepped(self) -> Commit | None:
        """A local step is over: pulses and meetings that are due. A Commit at a mark."""

    def meet_last(self) -> tuple[MetaSum, ...]:
        """Lands and applies what flies and ends the round early; afterwards the weights are the anchor. Returns the
        metas that were heard, at least one."""

    def values(self) -> Values:
        """Plain values for a checkpoint, equal on all ranks. What flies is landed."""

    def mine(self) -> Values:
        """Plain values for a checkpoint, of this rank alone."""

    def vectors(self) -> dict[str, torch.Tensor]:
        """Vectors over the flat vector for a checkpoint, equal on all ranks."""

    def load(self, state: State, mine: Values | None) -> None:
        """mine: what this rank had of its own; None at another world size."""


class LocalSteps(Common[L]):
    """outer: the outer optimizer. An exchange of this kind fills in `arrange`."""

    anchored = True
    resized = (
        "what each rank had of its own (moments, and weights since they last met) is left out, and all ranks begin "
        "with the shared weights and with clocks at 0, so the curve is not that of an unchanged world"
    )

    def __init__(self, settings: L, nominal: int, outer: Outer) -> None:
        super().__init__(settings, nominal)
        self.outer = outer

    def between(self, world: World) -> World:
        self.group = LocalGroup(self.settings, world)
        return self.group.across

    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        """wire: over the ranks of `between`."""
        self.flat, self.update, self.wire, self.world = flat, update, wire, world
        module = self.group.attach(model, flat, update, self.nominal, self.tally, self.unlike)
        self.anchor = self.anchored_at(flat, wire)
        self.fragments = self.divide(flat)
        replica = Replica(self.tally, self.group, self.anchor, update, world, self.fragments)
        self.replica, self.meetings = replica, self.arrange(replica)
        return module

    def anchored_at(self, flat: Flat, wire: Wire) -> Anchor:
        """The weights of the model become the anchor."""
        return Anchor(self.settings, self.nominal, self.outer, flat, wire)

    def divide(self, flat: Flat) -> list[Fragment]:
        """What meets together."""
        return [Fragment(list(flat.buckets))]

    def arrange(self, replica: Replica) -> Meetings:
        raise NotImplementedError

    # ------------------------------------------------------------------ the loop
    def text(self, stream: Stream) -> Rounded:
        """What this group trains on."""
        group = self.group
        return stream.group(group.number, group.count, group.inside.rank, group.inside.size)

    def trains(self) -> bool:
        """Whether this group computes. Otherwise a step of it is a wait for the others."""
        return self.group.bad is None

    def feed(self, stream: Stream) -> Iterator[Batch]:
        self.group.text = self.text(stream)
        inner = self.group.inner.feed(self.group.text)
        while True:
            try:
                batch = next(inner, None) if self.trains() else Nothing()
            except NotFinite as error:  # only this group knows; its next pulse says so
                self.group.bad, batch = error, Nothing()
            if batch is None:  # a stream on which nothing arrives was asked to stop
                return
            yield batch

    def disarm(self) -> None:
        self.group.inner.disarm()

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        tokens: int | None = 0
        if self.trains() and (tokens := self.group.advance(batch, loss)) is None:
            return None
        for fragment in self.fragments:
            fragment.tokens += tokens or 0
            fragment.steps += 1
        self.after_step()
        return self.meetings.stepped()

    def after_step(self) -> None:
        """A local step is over; pulses and meetings come after this."""

    # ------------------------------------------------------------------ acts
    def agree(self) -> int | None:
        """Puts the weights to keep into the model. Returns the tokens that they are of, None where it is all committed
        ones. Collective."""
        self.flat.x.copy_(self.anchor.x)
        return self.anchor.tokens

    @contextmanager
    def consensus(self) -> Iterator[int | None]:
        self.replica.land()
        mine = self.flat.x.clone()
        tokens = self.agree()
        try:
            yield tokens
        finally:
            self.flat.x.copy_(mine)

    def settle(self) -> Settled:
        self.replica.land()
        metas = self.meetings.meet_last()
        tokens = sum(int(meta.tokens) for meta in metas)
        self.tally.tokens += tokens
        self.anchor.tokens = self.tokens
        late, held, self.tally.held = self.replica.report(*metas), self.tally.held, None
        if held is not None:
            late = (Heard.of_report(held) + Heard.of_report(late)).report(held.grad_norm, self.world.size)
        return Settled(late, tokens)

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        self.replica.land()
        mine, local = self.group.state(self.flat)
        self.tally.read_seconds()
        wire, summed, tensors = self.wire.state()
        values = {**self.tally.state(), "wire": wire, "anchor_tokens": self.anchor.tokens, **self.meetings.values()}
        mine |= self.meetings.mine() | {
            "now": asdict(self.tally.own), "asks": [self.tally.asks.stop, self.tally.asks.save],
            "fragments": [[fragment.tokens, fragment.steps] for fragment in self.fragments],
        }  # fmt: skip
        outer = {f"outer.{name}": vector for name, vector in self.anchor.state.items()}
        sharded = {"model": self.anchor.x, **outer, **self.meetings.vectors()}
        spans = self.flat.pieces(0, 1) if self.world.rank == 0 else []
        if self.anchor.x.device != self.flat.x.device:
            wait_for_stream(self.flat.x.device)  # what is on its way to the host has arrived
        return State(values, spans, sharded, mine, summed, tensors, local)

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        self.anchor.x.copy_(model)
        self.group.inner.start(model, moments, steps)

    def load(self, state: State, mine: list[Values]) -> None:
        shared, size = state.shared, self.world.size
        same = len(mine) == size
        self.tally.load(shared, None if same else size)
        self.anchor.tokens = shared["anchor_tokens"]
        self.anchor.x.copy_(state.sharded["model"])
        for name, vector in self.anchor.state.items():
            vector.copy_(state.sharded[f"outer.{name}"])
        self.wire.load(shared["wire"], state.summed, state.tensors)
        own = mine[self.world.rank] if same else None
        if own is None:
            self.flat.x.copy_(self.anchor.x)
            self.group.base = self.tokens
        else:
            self.tally.own, self.tally.asks = RankReport(**own["now"]), Asks(*own["asks"])
            for fragment, (tokens, steps) in zip(self.fragments, own["fragments"], strict=True):
                fragment.tokens, fragment.steps = tokens, steps
            self.group.load(own, state.local)
        self.meetings.load(state, own)
