"""A group: the ranks that are one replica and train it on their own, by an inner exchange, on their own text.

A group is a single rank, or several ranks that all-reduce or shard within themselves (exchange.inner).

The learning rate of a local step is that of the tokens of all groups at the last meeting and, since then, of this
group's own tokens times the number of groups: what the others have done in the meantime does not enter it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hvdllm import registry
from hvdllm.device import Mark
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.allreduce import AllReduce
from hvdllm.exchange.base import Batch, NotFinite, Rounded, Spanned, State, Update, Values
from hvdllm.exchange.rounds import Rounds
from hvdllm.exchange.sharded import Sharded
from hvdllm.exchange.tally import RankReport, Tally
from hvdllm.exchange.wire.build import make_wire
from hvdllm.flat import Flat
from hvdllm.world.base import World
from hvdllm.world.single import SingleWorld


class LocalGroup:
    """number: of this group among `count`. replicas: how many train at the same time, as the learning rate counts them.
    inside, across: the ranks of this group, and those of all groups that meet in this rank's place.

    base: tokens of all groups at the last meeting, as the learning rate counts them; open: of this group since then
    bad: a masked step of this group, which no other group can see
    text: what this group trains on
    """

    text: Rounded
    inner: Rounds[Any]

    def __init__(self, settings: exchanges.LocalSteps, world: World) -> None:
        size = 1 if settings.inner == "none" else settings.group or world.local_size
        self.settings = settings
        self.count, self.number = world.size // size, world.rank // size
        self.replicas = self.count
        self.base = self.open = 0
        self.bad: NotFinite | None = None
        self._committed = 0  # tokens of the inner exchange
        if size == 1:
            alone = SingleWorld()
            alone.asks = world.asks
            self.inside: World = alone
            self.across = world
            return
        self.inside = world.split([tuple(range(g * size, (g + 1) * size)) for g in range(self.count)], "inside")
        self.across = world.split([tuple(range(place, world.size, size)) for place in range(size)], "across")

    def attach(
        self, model: nn.Module, flat: Flat, update: Update, nominal: int, tally: Tally, unlike: bool
    ) -> nn.Module:
        """nominal: tokens of a global batch of all groups. tally: that of the outer exchange."""
        self.tally = tally
        share = max(1, nominal // self.replicas)
        self.inner = (
            Sharded(exchanges.Sharded(), share)
            if self.settings.inner == "sharded"
            else AllReduce(exchanges.AllReduce(), share)
        )
        self.inner.unlike = unlike
        self.inner.reckon = lambda more: self.base + self.replicas * (self.open + more)
        self.inner.watch = self._watch
        self.inner.tally.told = self._told
        wire = make_wire(registry.kinds("wire")[self.settings.inner_wire](), self.inside, flat, share)
        return self.inner.attach(model, flat, update, wire, self.inside)

    def _watch(self, _: int, lane: str, begin: Mark, end: Mark) -> None:
        if self.tally.watch is not None:
            self.tally.watch(self.tally.step + 1, lane, begin, end)

    def _told(self, own: RankReport, norm: float) -> None:
        self.tally.own.add(own)
        self.tally.own.squares = norm**2

    def advance(self, batch: Batch, loss: torch.Tensor) -> int | None:
        """The tokens of a local step, where this micro-batch has completed one."""
        commit = self.inner.advance(batch, loss)
        if commit is None:
            return None
        tokens, self._committed = commit.tokens - self._committed, commit.tokens
        self.open += tokens
        self.tally.own.tokens += tokens
        self.tally.ask(commit.asks)
        return tokens

    def land(self) -> None:
        """Reads what came of the last local step; this is the one host read between two pulses."""
        try:
            self.inner.land()
        except NotFinite as error:
            self.bad = error

    # ------------------------------------------------------------------ checkpoint
    def state(self, flat: Flat) -> tuple[Values, dict[str, Spanned]]:
        """Plain values and vectors of this rank alone."""
        inner = self.inner.state()
        local: dict[str, Spanned] = {"model": (flat.pieces(0, 1), flat.x)}
        local |= {f"update.{n}": (self.inner.owned, v) for n, v in inner.sharded.items() if n != "model"}
        local |= {f"inner.{kind}": spanned for kind, spanned in inner.summed.items()}
        return {"base": self.base, "open": self.open, "inner": [inner.shared, inner.mine]}, local

    def load(self, mine: Values, local: dict[str, torch.Tensor]) -> None:
        self.base, self.open = mine["base"], mine["open"]
        shared, own = mine["inner"]
        vectors = {name.removeprefix("update."): v for name, v in local.items() if name.startswith("update.")}
        summed = {name.removeprefix("inner."): v for name, v in local.items() if name.startswith("inner.")}
        state = State(shared, [], {"model": local["model"], **vectors}, {}, summed)
        self.inner.load(state, [own] * self.inside.size)
        self._committed = self.inner.tokens
