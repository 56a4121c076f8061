"""A small net under any exchange on virtual ranks, each with other data and ragged counts, in fp64; and plain
references.

An example counts as a token. `gradient` is the sum over the examples of one part of a global batch, at given weights:
what the references are made of.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from hvdllm.exchange.base import NotFinite, State
from hvdllm.exchange.wire import parts as wires
from hvdllm.flat import Flat
from hvdllm.optim import parts as optims
from hvdllm.optim.update import Update
from hvdllm.settings import Config
from hvdllm.trainer import assemble as trainer_assemble
from hvdllm.trainer.assemble import assemble
from hvdllm.world import virtual

NOMINAL = 24  # examples of a global batch
MICRO = 3
Data = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]  # of a client or group and its step


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def examples(part: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one part of a global batch; the size of gradients changes from part to part, from small to large."""
    draw = torch.Generator().manual_seed(1000 + part)
    x = torch.randn(NOMINAL // parts, 4, generator=draw, dtype=torch.float64)
    t = torch.randn(NOMINAL // parts, 3, generator=draw, dtype=torch.float64) * (0.3 + part % 4)
    return x, t


def deal(part: int, parts: int, rank: int, size: int) -> slice:
    """A rank's consecutive share; ragged, and another from part to part."""
    count = NOMINAL // parts
    draw = torch.Generator().manual_seed(part)
    cuts = (torch.randperm(count - 1, generator=draw)[: size - 1] + 1).sort().values.tolist()
    borders = [0, *cuts, count]
    return slice(borders[rank], borders[rank + 1])


def own_examples(group: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one local step of a group: its own distribution, and a number that differs from group and step to step."""
    draw = torch.Generator().manual_seed(50_000 + 1000 * group + step)
    count = 4 + (group + 2 * step) % 3
    x = torch.randn(count, 4, generator=draw, dtype=torch.float64) + 0.3 * group
    return x, torch.randn(count, 3, generator=draw, dtype=torch.float64) * (0.3 + (group + step) % 4)


def batches(x: torch.Tensor, t: torch.Tensor, round: int, micro: int) -> list[Any]:
    """Micro-batches of one share, which may be empty."""
    if not len(x):
        return [SimpleNamespace(inputs=None, targets=None, tokens=0, last=True, round=round, index=0)]
    cut = list(zip(x.split(micro), t.split(micro), strict=True))
    return [SimpleNamespace(inputs=a, targets=b, tokens=len(a), last=i == len(cut) - 1, round=round, index=i)
            for i, (a, b) in enumerate(cut)]  # fmt: skip


class Group:
    """The stream of a group, as one of its ranks has it."""

    def __init__(self, whole: Examples, index: int, rank: int, size: int) -> None:
        self.whole, self.index, self.rank, self.size, self.data = whole, index, rank, size, whole.data

    def rounds(self, parts: int = 1) -> Iterator[list[Any]]:
        while True:
            self.whole.taken += 1
            yield self.share(self.whole.taken - 1)

    def share(self, number: int, parts: int = 1) -> list[Any]:
        x, t = self.data(self.index, number)
        part = slice(len(x) * self.rank // self.size, len(x) * (self.rank + 1) // self.size)
        return batches(x[part], t[part], number, self.whole.micro)


class Federation:
    """Clients of very different size, one of them (2) without text, and not a client's steps of equal size either."""

    def __init__(self, whole: Examples, count: int) -> None:
        self.whole, self.data = whole, whole.data
        self.tokens = [0 if client == 2 else 100 + 70 * (client * client % 5) for client in range(count)]

    def sample(self, round: int, count: int | None) -> list[int]:
        known = [client for client, tokens in enumerate(self.tokens) if tokens]
        draw = torch.Generator().manual_seed(7000 + round)
        return sorted(known[i] for i in torch.randperm(len(known), generator=draw).tolist()[:count])

    def walk(self, plan: Iterator[tuple[int, int]], of: int, rank: int, size: int) -> Turns:
        return Turns(self, plan, rank, size)


class Turns:
    """Clients one after the other, as one of the ranks that train them together has them."""

    def __init__(self, federation: Federation, plan: Iterator[tuple[int, int]], rank: int, size: int) -> None:
        self.federation, self.plan, self.rank, self.size = federation, plan, rank, size

    def rounds(self, parts: int = 1) -> Iterator[list[Any]]:
        for client, step in self.plan:
            self.federation.whole.taken += 1
            yield self.share(step * len(self.federation.tokens) + client)

    def share(self, number: int, parts: int = 1) -> list[Any]:
        step, client = divmod(number, len(self.federation.tokens))
        x, t = self.federation.data(client, step)
        part = slice(len(x) * self.rank // self.size, len(x) * (self.rank + 1) // self.size)
        return batches(x[part], t[part], number, self.federation.whole.micro)


class Examples:
    """The stream of one rank. taken: local steps of its group, or micro-batches of its lane."""

    ends_rounds = False

    def __init__(self, rank: int, size: int, data: Data = own_examples, micro: int = MICRO) -> None:
        self.micro, self.rank, self.size, self.next, self.taken, self.data = micro, rank, size, 0, 0, data

    def group(self, index: int, of: int, rank: int, size: int) -> Group:
        return Group(self, index, rank, size)

    def clients(self, count: int, alpha: float | None) -> Federation:
        return Federation(self, count)

    def lane(self, index: int, of: int, most: int) -> Iterator[Any]:
        """Where no count closes a round: micro-batches of `most` examples."""
        while True:
            at, self.taken = self.taken, self.taken + 1
            draw = torch.Generator().manual_seed(90_000 + 1000 * index + at)
            x, t = (torch.randn(max(1, most), width, generator=draw, dtype=torch.float64) for width in (4, 3))
            yield SimpleNamespace(inputs=x, targets=t, tokens=len(x), last=False, round=at, index=index)

    def rounds(self, parts: int = 1) -> Iterator[list[Any]]:
        for part in itertools.count(self.next):
            x, t = (each[deal(part, parts, self.rank, self.size)] for each in examples(part, parts))
            self.next = part + 1
            yield batches(x, t, part, self.micro)


def loss(model: nn.Module, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return (model(x) - t).square().sum() / 2


@dataclass
class Rig:
    """What a run of one rank leaves."""

    weights: list[torch.Tensor] = field(default_factory=list)  # after each commit, by registration order
    kept: list[torch.Tensor] = field(default_factory=list)  # within consensus, where there were acts
    of: list[int | None] = field(default_factory=list)  # tokens that those are said to be of
    commits: list[Any] = field(default_factory=list)
    begun: Any = None  # weights before the first step
    asked: int | None = None  # commits before it was
    unheard: bool = False  # left with what no meta has taken along
    bad: NotFinite | None = None
    settled: Any = None
    final: Any = None
    state: Any = None  # (State, stream position) where asked for
    sent: float = 0.0
    taken: int = 0  # local steps of its group
    fed: int = 0  # examples that it has computed
    fragments: Any = None  # of the model that meet together: names of their tensors


def steps_noted(monkeypatch: Any) -> list[int]:
    """The tokens at which each step of an optimizer looks its rate up, of all ranks, from here on."""
    found: list[int] = []

    class Noted(Update):
        def step(self, pieces: Any, grad: Any, meta: Any, *more: Any, **named: Any) -> Any:
            found.append(meta.committed)
            return super().step(pieces, grad, meta, *more, **named)

    monkeypatch.setattr(trainer_assemble, "Update", Noted)
    return found


def settings_of(exchange: Any, optim: Any, wire: Any, steps: int, acts: bool) -> Config:
    """A run of these parts, with a bucket for each tensor and a mark after each global batch."""
    return Config(
        batch_tokens=NOMINAL, exchange=replace(exchange, bucket_mb=2**-20), optim=optim, wire=wire, log_every=NOMINAL,
        eval_every=NOMINAL if acts else 0, sample_every=0, save_every=0, audit_every=0, budget_tokens=steps * NOMINAL,
    )  # fmt: skip


def flatten(flat: Flat) -> torch.Tensor:
    return torch.cat([flat.view(name).reshape(-1) for name in flat.parameters])


def train(
    exchange: Any,
    size: int,
    steps: int,
    *,
    optim: Any,
    wire: Any = None,
    rate: Callable[[int], float] = lambda tokens: 1.0,
    acts: bool = False,
    stop_at: int | None = None,
    states: list[Any] | None = None,
    hosts: int = 1,
    settle: bool = True,
    model: Callable[[], nn.Module] = net,
    cost: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = loss,
    links: Any = None,
    speeds: Callable[[int], float] = lambda rank: 1.0,
    data: Data = own_examples,
    micro: int = MICRO,
    ask: tuple[int, int] | None = None,
    bad: tuple[int, int] | None = None,
    catch: bool = False,
    unlike: bool = False,
) -> list[Rig]:
    """Runs `steps` commits on each of `size` ranks.

    Args:
        stop_at: leave after that commit, with its state.
        states: of all ranks, to go on from.
        links: there is a simulated clock, and speeds are each rank's examples a second on it.
        data: of groups and clients.
        micro: examples of a micro-batch at most.
        ask: a rank, and after which micro-batch it is asked to save.
        bad: a rank, and in which micro-batch its loss is no number.
        catch: a rank that a bad number ends leaves it in `bad`.
    """

    def body(world: Any) -> Rig:
        out, net_ = Rig(), model()
        config = settings_of(exchange, optim, wire or wires.Fp32(), steps, acts or stop_at is not None)
        parts = assemble(config, net_, net_, world, rate, unlike)
        part, flat = parts.exchange, parts.flat
        stream = Examples(world.rank, world.size, data, micro)
        if states is not None:
            load(part, flat, states, world, model)
            stream.next, stream.taken = states[world.rank if len(states) == size else 0][1]
        out.begun = flatten(flat)
        computed = 0
        for number, batch in enumerate(part.feed(stream)):
            value = torch.zeros((), dtype=torch.float64)
            if batch.tokens:
                if links is not None:
                    world.spend(batch.tokens / speeds(world.rank))
                out.fed += batch.tokens
                value = cost(net_, batch.inputs, batch.targets)
                computed += 1
                if bad == (world.rank, computed):
                    value = value * math.nan
                value.backward()
            commit = part.advance(batch, value.detach())
            if ask == (world.rank, number):
                world.asks.save, out.asked = True, len(out.commits) + (commit is not None)
            if commit is None:
                continue
            out.commits.append(commit)
            out.weights.append(flatten(flat))
            if acts:
                part.state()
                with part.consensus() as of:
                    out.of.append(of)
                    world.sum(torch.ones(1), "act.x").land()
                    out.kept.append(flatten(flat))
            if commit.step == stop_at:
                out.state, out.unheard = (freeze(part.state()), (stream.next, stream.taken)), world.asks.save
                break
            if commit.step >= steps:
                break
        if settle:
            out.settled = part.settle()
            out.final = flatten(flat)
        out.sent, out.taken = world.bytes_sent, stream.taken
        out.fragments = [[n for b in each.buckets for n in b.names] for each in getattr(part, "fragments", [])]
        return out

    def caught(world: Any) -> Rig:
        try:
            return body(world)
        except NotFinite as error:
            return Rig(bad=error)

    return virtual.run(size, caught if catch else body, hosts=hosts, links=links)


def freeze(state: State) -> State:
    copy = deepcopy(state)
    copy.sharded = {name: vector.clone() for name, vector in state.sharded.items()}
    copy.local = {name: (spans, vector.clone()) for name, (spans, vector) in state.local.items()}
    return copy


def load(part: Any, flat: Flat, states: list[Any], world: Any, model: Callable[[], nn.Module]) -> None:
    """As checkpoint/ does it, without files: by names of tensors, through the map of those who saved."""
    saved = [state for state, _ in states]
    old = Flat(model(), len(saved), 1)

    def gather(pairs: list[Any]) -> torch.Tensor:
        vector = torch.zeros_like(flat.x)
        for spans, values in pairs:
            for name, start, piece in old.cut(spans, values):
                begin = flat.at[name].start + start
                vector[begin : begin + len(piece)] += piece
        return vector

    whole = {kind: gather([(s.spans, s.sharded[kind]) for s in saved]) for kind in saved[0].sharded}
    same = len(saved) == world.size
    who = [saved[world.rank]] if same else saved if world.rank == 0 else []
    summed = {kind: gather([s.summed[kind] for s in who]) for kind in saved[0].summed}
    kinds = {kind for s in saved for kind in s.local}
    local = {kind: gather([saved[world.rank].local.get(kind, ([], flat.x[:0]))]) for kind in kinds} if same else {}
    mine = [deepcopy(s.mine) for s in saved]
    part.load(State(deepcopy(saved[0].shared), [], whole, {}, summed, saved[0].tensors, local), mine)


# ------------------------------------------------------------------ plain references
class ConstantNAdam:
    """Dozat's rule from its history of gradients; torch's own lets the momentum grow over thousands of steps."""

    def __init__(self, groups: list[Any], optim: Any) -> None:
        self.param_groups, self.optim, self.history = groups, optim, []

    def state_dict(self) -> Any:
        return list(self.history)

    def load_state_dict(self, state: Any) -> None:
        self.history = state

    @torch.no_grad()
    def step(self) -> None:
        b1, b2, eps = self.optim.beta1, self.optim.beta2, self.optim.eps
        self.history.append([[p.grad.clone() for p in group["params"]] for group in self.param_groups])
        t = len(self.history)
        for k, group in enumerate(self.param_groups):
            for j, p in enumerate(group["params"]):
                g = [old[k][j] for old in self.history]
                m = sum((1 - b1) * b1 ** (t - 1 - i) * g[i] for i in range(t))
                v = sum((1 - b2) * b2 ** (t - 1 - i) * g[i] ** 2 for i in range(t))
                look = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * g[-1] / (1 - b1**t)
                p -= group["lr"] * (group["weight_decay"] * p + look / ((v / (1 - b2**t)) ** 0.5 + eps))


def put(model: nn.Module, x: torch.Tensor) -> None:
    """Weights by registration order."""
    with torch.no_grad():
        for p, piece in zip(model.parameters(), x.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(piece.view(p.shape))


def own_gradient(x: torch.Tensor, group: int, step: int) -> tuple[torch.Tensor, int]:
    """Sum of a group's local step at these weights, and its examples."""
    model = net()
    put(model, x)
    inputs, targets = own_examples(group, step)
    loss(model, inputs, targets).backward()
    return torch.cat([p.grad.reshape(-1) for p in model.parameters()]), len(inputs)  # type: ignore[union-attr]


class Plain:
    """The whole batch on one process with torch's optimizers. x: weights by registration order."""

    def __init__(self, optim: Any, rate: Callable[[int], float] = lambda tokens: 1.0) -> None:
        self.model, self.optim, self.rate = net(), optim, rate
        self.parameters = list(self.model.parameters())
        decay = [p for p in self.parameters if p.dim() >= 2]
        rest = [p for p in self.parameters if p.dim() < 2]
        groups = [{"params": decay, "weight_decay": optim.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        if isinstance(optim, optims.SGD):
            self.torch: Any = torch.optim.SGD(groups, lr=1.0, momentum=optim.momentum, nesterov=optim.nesterov)
        elif isinstance(optim, optims.NAdam):
            self.torch = ConstantNAdam(groups, optim)
        else:
            self.torch = torch.optim.AdamW(groups, lr=1.0, betas=(optim.beta1, optim.beta2), eps=optim.eps)
        self.tokens = 0

    @property
    def x(self) -> torch.Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.parameters])

    def gradient(self, at: torch.Tensor, part: int, parts: int = 1) -> torch.Tensor:
        """Sum over one part of a batch, at these weights."""
        model = net()
        put(model, at)
        loss(model, *examples(part, parts)).backward()
        return torch.cat([p.grad.reshape(-1) for p in model.parameters()])  # type: ignore[union-attr]

    def step(self, total: torch.Tensor, tokens: int) -> torch.Tensor:
        """Divides the sum, clips, steps; the weights afterwards."""
        self.tokens += tokens
        mean = total / tokens
        if self.optim.clip:
            mean = mean * min(1.0, self.optim.clip / mean.norm().item())
        for p, piece in zip(self.parameters, mean.split([p.numel() for p in self.parameters]), strict=True):
            p.grad = piece.view(p.shape).clone()
        for group in self.torch.param_groups:
            group["lr"] = self.optim.lr * self.rate(self.tokens)
        self.torch.step()
        return self.x

    def peek(self, total: torch.Tensor, tokens: int) -> torch.Tensor:
        """The same, and everything as before."""
        before, state, weights = self.tokens, deepcopy(self.torch.state_dict()), self.x
        after = self.step(total, tokens)
        self.torch.load_state_dict(state)
        self.tokens = before
        put(self.model, weights)
        return after
