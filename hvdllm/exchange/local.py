"""What exchanges with local steps have in common: groups of ranks train on their own and meet now and then.

group    ranks that are one replica: a single rank, or (inner) several that all-reduce or shard within themselves
step     one update of a group, by its inner exchange, on its own lane of the text
anchor   the weights that all groups shared last: what a user would keep, and what evaluation sees
round    local steps from one meeting to the next
pulse    a meta of all ranks, and nothing else, in mid-round: posted at one pulse, awaited at the next, so nobody waits
         for what has just been said. Pulses make tokens exact, asks heard and logs possible between meetings; their
         number changes no weight
mark     a pulse that has landed

    each group:  `steps` times  x = Update(x, g)             # own moments, never reset or averaged; clipping is local
    meeting:     d = mean of (anchor - x);  anchor = Outer(anchor, d);  x = anchor

The mean is over groups, weighted by their tokens a step t_i, of deltas normalised by their steps H_i (FedNova, Wang et
al., 2020, arXiv 2007.07481), so that groups of different speed may take different numbers of steps and the fixed point
stays that of the objective:  d = (sum t_i H_i / sum t_i) (sum t_i (anchor - x_i) / H_i) / sum t_i.  With equal H_i it
is the token-weighted mean.

A local step's learning rate is that of the tokens at the last meeting and, since then, this group's own times the
number of groups: what the others have done in the meantime does not enter it.

A local step whose gradient is not finite is masked, as are those behind it; only its group can see it, so its pulse
says so and all ranks stop at the same mark.

A checkpoint has the anchor and the outer optimizer's state once, and what each rank has of its own: weights, moments,
clocks. At another world size all begin with the anchor. More in
hvdllm/exchange/README.md, "Local steps".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import nn

from hvdllm import registry
from hvdllm.device import Mark, wait_for_stream
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.allreduce import AllReduce
from hvdllm.exchange.base import (
    Batch,
    Commit,
    NotFinite,
    Nothing,
    Report,
    Rounded,
    Settled,
    Spanned,
    State,
    Stream,
    Update,
    Wire,
)  # fmt: skip
from hvdllm.exchange.meta import SLOT, MetaPost, MetaSum
from hvdllm.exchange.rounds import Rounds
from hvdllm.exchange.sharded import Sharded
from hvdllm.exchange.wire.build import build as make_wire
from hvdllm.world.base import Asks, Flight, World
from hvdllm.world.single import Landed, SingleWorld

INNER: dict[str, tuple[type[Rounds], Any]] = {
    "none": (AllReduce, exchanges.AllReduce()),
    "allreduce": (AllReduce, exchanges.AllReduce()),
    "sharded": (Sharded, exchanges.Sharded()),
}
INNER_WIRES = {name: registry.kinds("wire")[name] for name in ("fp32", "fp16", "bf16", "int8")}


@dataclass
class Window:
    """What this rank has to say in its next pulse. tokens: of the whole group, said by its first rank."""

    tokens: int = 0
    loss: float = 0.0
    loss_tokens: float = 0.0
    squares: float = 0.0  # of the last norm that is known
    compute_s: float = 0.0
    blocked_s: float = 0.0
    flight_s: float = 0.0
    cpu_s: float = 0.0
    micro_batches: float = 0.0

    def add(self, said: dict[str, float], slot: dict[str, float], norm: float) -> None:
        """What came of one step on this rank."""
        self.loss += said["loss"]
        self.loss_tokens += said["loss_tokens"]
        self.squares = norm**2
        for name in SLOT:
            setattr(self, name, getattr(self, name) + slot[name])


class Posted(Protocol):
    def land(self) -> MetaSum: ...


@dataclass
class Pulse:
    """One on its way. meeting: it was posted where a round ended."""

    meta: Posted
    meeting: bool


@dataclass
class Fragment:
    """Buckets that meet together, neighbours in the map. tokens, steps: of this group since they last met."""

    buckets: list[Any]
    tokens: int = 0
    steps: int = 0


class LocalSteps:
    """An exchange of this kind fills in `synchronise` (what a step closes) and `close` (the last meeting)."""

    copies = 1
    identical = False
    anchored = True
    marks_on_ask = False
    unlike = False  # as of Rounds: of the ranks of a group
    resized = (
        "what each rank had of its own (weights since they last met, moments) has no place, all begin with the shared "
        "weights and with clocks at 0, so the curve is not that of an unchanged world"
    )

    def __init__(self, settings: Any, nominal: int) -> None:
        self.settings, self.nominal = settings, nominal
        self.tokens = self.step = 0
        self.watch: Callable[[int, str, Mark, Mark], None] | None = None
        self.held: Report | None = None  # of the last commit
        self.anchor_tokens = 0  # committed tokens that the anchor is of
        self._base = 0  # tokens of all groups at the last meeting, as the rate counts them
        self._open = 0  # of this group since
        self._inner_tokens = 0  # that the inner exchange has committed
        self._now = Window()
        self._intervals: list[tuple[str, Mark, Mark]] = []
        self._asks = Asks()  # heard inside the group, to be passed on
        self._bad: NotFinite | None = None
        self._parity = 0

    # ------------------------------------------------------------------ who is a replica
    def between(self, world: World) -> World:
        size = 1
        if self.settings.inner != "none":
            size = self.settings.group or world.local_size
        self.groups, self.group = world.size // size, world.rank // size
        self.replicas = self.groups  # that train at the same time, as the rate counts them
        if size == 1:
            alone = SingleWorld()
            alone.asks = world.asks
            self.inside: World = alone
            return world
        self.inside = world.split([tuple(range(g * size, (g + 1) * size)) for g in range(self.groups)], "inside")
        return world.split([tuple(range(place, world.size, size)) for place in range(size)], "across")

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        """wire: over `between`."""
        self.flat, self.update, self.wire, self.world = flat, update, wire, world
        self.device = flat.x.device
        kind, settings = INNER[self.settings.inner]
        share = max(1, self.nominal // self.replicas)
        self.inner = kind(settings, share)
        self.inner.unlike = self.unlike
        self.inner.reckon = lambda more: self._base + self.replicas * (self._open + more)
        self.inner.watch = self._note
        self.inner.told = lambda said, slot, norm: self._now.add(said, slot, norm)
        inner_wire = make_wire(INNER_WIRES[self.settings.inner_wire](), self.inside, flat, share)
        module = self.inner.attach(model, flat, update, inner_wire, self.inside)
        self.buffer = flat.gradients[-1]  # deltas travel in it; where it is the only one it is zero between two steps
        self.anchor = self._shared()
        self.anchor.copy_(flat.x)
        self.outer = {name: self._shared() for name in self.outer_vectors()}
        self.fragments = self.cut()
        return module

    def _shared(self) -> torch.Tensor:
        """A vector over the map that is needed at meetings alone."""
        if self.settings.host_memory and self.device.type == "cuda":
            return torch.zeros(self.flat.x.shape, dtype=self.flat.x.dtype, pin_memory=True)
        return torch.zeros_like(self.flat.x)

    def cut(self) -> list[Fragment]:
        return [Fragment(list(self.flat.buckets))]

    # ------------------------------------------------------------------ the outer optimizer
    def outer_vectors(self) -> tuple[str, ...]:
        """Names of its state."""
        return ()

    def outer_rate(self) -> float:
        """What one unit of the mean delta moves the anchor by."""
        return 1.0

    def outer_step(self, anchor: torch.Tensor, delta: torch.Tensor, state: dict[str, torch.Tensor]) -> None:
        """On slices, in place."""
        anchor.sub_(delta)

    # ------------------------------------------------------------------ the loop
    def text(self, stream: Stream) -> Rounded:
        """What this group trains on."""
        return stream.group(self.group, self.groups, self.inside.rank, self.inside.size)

    def trains(self) -> bool:
        """Is a step of this group more than a wait for the others?"""
        return self._bad is None

    def feed(self, stream: Stream) -> Iterator[Batch]:
        self._text = self.text(stream)
        inner = self.inner.feed(self._text)
        while True:
            try:
                yield next(inner) if self.trains() else Nothing()
            except NotFinite as error:  # only this group knows; the next pulse says it
                self._bad = error
                yield Nothing()

    def disarm(self) -> None:
        self.inner.disarm()

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        if self.trains():
            commit = self.inner.advance(batch, loss)
            if commit is None:
                return None
            self._book(commit)
        for fragment in self.fragments:
            fragment.steps += 1
        return self.synchronise()

    def _book(self, commit: Commit) -> None:
        tokens = commit.tokens - self._inner_tokens
        self._inner_tokens = commit.tokens
        self._open += tokens
        self._now.tokens += tokens
        for fragment in self.fragments:
            fragment.tokens += tokens
        self._asks = Asks(self._asks.stop or commit.asks.stop, self._asks.save or commit.asks.save)

    def synchronise(self) -> Commit | None:
        """A local step is over: pulses and meetings that are due. A Commit at a mark."""
        raise NotImplementedError

    # ------------------------------------------------------------------ pulses
    def pulse(self, meeting: bool = False, weight: float = 0.0, steps: float = 0.0) -> Pulse:
        """Posts what this rank has to say. weight, steps: of the deltas that travel with it."""
        self._land_inner()  # the one host read
        self._read_intervals()
        now, self._now = self._now, Window()
        asks, self._asks = self._asks, Asks()
        values = {"loss": now.loss, "loss_tokens": now.loss_tokens}
        values |= {"stop": float(asks.stop), "save": float(asks.save), "bad": float(self._bad is not None)}
        if self.inside.rank == 0:
            values |= {"tokens": float(now.tokens), "squares": now.squares, "weight": weight, "steps": steps}
        self._parity = 1 - self._parity
        return Pulse(MetaPost(self.world, self._parity, values, {name: getattr(now, name) for name in SLOT}), meeting)

    def heed(self, pulse: Pulse) -> MetaSum:
        """Lands it. Raises NotFinite, on every rank, where any group has masked a step."""
        meta = pulse.meta.land()
        if meta.bad:
            raise self._not_finite()
        return meta

    def _not_finite(self) -> NotFinite:
        bad = self._bad
        rounds, norm = (bad.rounds, bad.norm) if bad is not None else ([], math.nan)
        return NotFinite(self.step + 1, rounds, norm, left=True, stream=self._text, again=True)

    def commit(self, *metas: MetaSum, staleness: float = 0.0) -> Commit:
        before, self.held = self.held, self._report(metas)
        self.tokens, self.step = self.tokens + sum(int(meta.tokens) for meta in metas), self.step + 1
        asks = Asks(any(meta.asks.stop for meta in metas), any(meta.asks.save for meta in metas))
        # Not that of the last local step, which may be far beyond the pulse whose tokens these are.
        return Commit(self.tokens, self.step, self.update.rate(self.tokens), staleness, before, asks)

    def _report(self, metas: tuple[MetaSum, ...]) -> Report:
        slots = {name: [sum(each) for each in zip(*(m.slots[name] for m in metas), strict=True)] for name in SLOT}
        norm = math.sqrt(metas[-1].squares / self.groups)  # root mean square of the groups' own
        return Report(sum(m.loss for m in metas), sum(m.loss_tokens for m in metas), norm, None, **slots)

    def _note(self, step: int, lane: str, begin: Mark, end: Mark) -> None:
        if self.watch is not None:
            self.watch(self.step + 1, lane, begin, end)

    def _read_intervals(self) -> None:
        intervals, self._intervals = self._intervals, []
        for lane, begin, end in intervals:
            name = f"{lane}_s"
            setattr(self._now, name, getattr(self._now, name) + begin.until(end))
            self._note(self.step + 1, lane, begin, end)

    def blocked(self, since: Mark, launched: Mark) -> None:
        """Compute has stood still since then for what was launched."""
        if self.world.size > 1:
            now = Mark(self.device)
            self._intervals += [("blocked", since, now), ("flight", launched, now)]

    # ------------------------------------------------------------------ meetings
    def launch(self, fragment: Fragment) -> tuple[list[Flight], float, float]:
        """Sends this group's weighted deltas of a fragment, in `buffer`. Returns the flights, and weight and steps for
        the pulse. The fragment counts anew."""
        steps = max(fragment.steps, 1)
        weight = fragment.tokens / steps
        # In the size of a mean delta times the tokens of a batch, as a wire expects a sum of gradients to be.
        factor = weight * self.settings.local_steps / steps
        self.wire.begin(self.tokens, self.outer_rate() / self.nominal)
        flights = []
        for bucket in reversed(fragment.buckets):
            span = slice(bucket.span.start, bucket.span.stop)
            x = self.buffer[span]
            torch.sub(self.anchor[span].to(x.device, non_blocking=True), self.flat.x[span], out=x).mul_(factor)
            flights.append(self.wire.sum(x, f"grad.{bucket.index}"))
        fragment.tokens = fragment.steps = 0
        return flights, weight, weight * steps

    def scale(self, meta: MetaSum) -> float:
        """Of what has arrived, to be the mean delta."""
        return meta.steps / meta.weight**2 / float(self.settings.local_steps)

    def meet(self, fragment: Fragment, flights: list[Flight], meta: MetaSum, mixing: float = 0.0) -> None:
        """Lands what `launch` sent, steps the anchor, unless nobody has made a step; the weights become
        anchor + mixing (weights - anchor)."""
        for flight in flights:
            flight.land()
        if not meta.weight:
            return
        scale = self.scale(meta)
        for bucket in fragment.buckets:
            span = slice(bucket.span.start, bucket.span.stop)
            anchor = self.anchor[span].to(self.device, non_blocking=True)
            state = {name: vector[span].to(self.device, non_blocking=True) for name, vector in self.outer.items()}
            self.outer_step(anchor, self.buffer[span].mul_(scale), state)
            if anchor.device != self.anchor.device:
                self.anchor[span].copy_(anchor, non_blocking=True)
                for name, values in state.items():
                    self.outer[name][span].copy_(values, non_blocking=True)
            if mixing:
                self.flat.x[span].lerp_(anchor, 1 - mixing)
            else:
                self.flat.x[span].copy_(anchor)
            self.buffer[span].zero_()

    # ------------------------------------------------------------------ acts
    def _land(self) -> None:
        """Lands, without applying, what flies. Raises NotFinite, on every rank. Collective."""
        self._land_inner()
        bad = torch.tensor([float(self._bad is not None)], dtype=torch.float64)
        if self.world.sum(bad, "act.bad").land().item():
            raise self._not_finite()

    def _land_inner(self) -> None:
        try:
            self.inner.land()
        except NotFinite as error:
            self._bad = error

    def agreed(self) -> int | None:
        """Puts the weights to keep into the model; the tokens that they are of, None where of all committed ones.
        Collective."""
        self.flat.x.copy_(self.anchor)
        return self.anchor_tokens

    @contextmanager
    def consensus(self) -> Iterator[int | None]:
        self._land()
        mine = self.flat.x.clone()
        tokens = self.agreed()
        try:
            yield tokens
        finally:
            self.flat.x.copy_(mine)

    def settle(self) -> Settled:
        self._land()
        tokens, metas = self.tokens, self.close()
        held, late = self.held, self._report(metas)
        self.tokens += sum(int(meta.tokens) for meta in metas)
        self.anchor_tokens, self.held = self.tokens, None
        if held is None:
            return Settled(late, self.tokens - tokens)
        both = {name: [a + b for a, b in zip(getattr(held, name), getattr(late, name), strict=True)] for name in SLOT}
        loss, loss_tokens = held.loss_sum + late.loss_sum, held.loss_tokens + late.loss_tokens
        return Settled(Report(loss, loss_tokens, held.grad_norm, None, **both), self.tokens - tokens)

    def close(self) -> tuple[MetaSum, ...]:
        """Lands and applies what flies and closes the round early: afterwards the weights are the anchor. Returns all
        pulses heeded, at least one."""
        raise NotImplementedError

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        self._land()
        inner = self.inner.state()
        self._read_intervals()
        shared, summed, tensors = self.wire.state()
        whole = self.flat.pieces(0, 1)
        local: dict[str, Spanned] = {"model": (whole, self.flat.x)}
        local |= {f"update.{n}": (self.inner.owned, v) for n, v in inner.sharded.items() if n != "model"}
        local |= {f"inner.{kind}": spanned for kind, spanned in inner.summed.items()}
        values = {
            "tokens": self.tokens, "step": self.step, "wire": shared, "anchor_tokens": self.anchor_tokens,
            "held": asdict(self.held) if self.held is not None else None, **self.values(),
        }  # fmt: skip
        mine = {
            "base": self._base, "open": self._open, "now": asdict(self._now),
            "fragments": [[fragment.tokens, fragment.steps] for fragment in self.fragments],
            "asks": [self._asks.stop, self._asks.save], "inner": [inner.shared, inner.mine],
        }  # fmt: skip
        sharded = {"model": self.anchor, **{f"outer.{n}": v for n, v in self.outer.items()}, **self.vectors()}
        spans = whole if self.world.rank == 0 else []
        if self.anchor.device != self.device:
            wait_for_stream(self.device)  # what is on its way to the host has arrived
        return State(values, spans, sharded, mine, summed, tensors, local)

    def values(self) -> dict[str, Any]:
        """More plain values, equal on all ranks; what flies has landed."""
        return {}

    def vectors(self) -> dict[str, torch.Tensor]:
        """More vectors over the map, equal on all ranks."""
        return {}

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        self.anchor.copy_(model)
        self.inner.start(model, moments, steps)

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        shared = state.shared
        self.tokens, self.step, self.anchor_tokens = shared["tokens"], shared["step"], shared["anchor_tokens"]
        self.held = Report(**shared["held"]) if shared["held"] else None
        self.anchor.copy_(state.sharded["model"])
        for name, vector in self.outer.items():
            vector.copy_(state.sharded[f"outer.{name}"])
        self.wire.load(shared["wire"], state.summed, state.tensors)
        if len(mine) != self.world.size:
            if self.held is not None:
                self.held = self.held.elsewhere(self.world.size)
            self.flat.x.copy_(self.anchor)
            self._base = self.tokens
            return
        own = mine[self.world.rank]
        self._base, self._open = own["base"], own["open"]
        self._now, self._asks = Window(**own["now"]), Asks(*own["asks"])
        for fragment, (tokens, steps) in zip(self.fragments, own["fragments"], strict=True):
            fragment.tokens, fragment.steps = tokens, steps
        inner_shared, inner_mine = own["inner"]
        vectors = {name.removeprefix("update."): v for name, v in state.local.items() if name.startswith("update.")}
        summed = {name.removeprefix("inner."): v for name, v in state.local.items() if name.startswith("inner.")}
        inner = State(inner_shared, [], {"model": state.local["model"], **vectors}, {}, summed)
        self.inner.load(inner, [inner_mine] * self.inside.size)
        self._inner_tokens = self.inner.tokens


def again(meta: MetaSum, meeting: bool) -> Pulse:
    """A pulse that has arrived, from a checkpoint."""
    return Pulse(Landed(meta), meeting)
