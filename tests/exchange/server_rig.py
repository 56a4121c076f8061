"""A parameter server under the rig's small net, on virtual ranks whose micro-batches take as long as a test says."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from rig import Rig, flatten, freeze, load, loss, net, own_examples
from torch import nn

from hvdllm.exchange.base import Milestones
from hvdllm.exchange.parameter_server import ParameterServer
from hvdllm.exchange.parts import ParameterServer as Settings
from hvdllm.flat import Flat
from hvdllm.optim.update import Update
from hvdllm.world import virtual
from hvdllm.world.base import Asks
from hvdllm.world.virtual_mail import VirtualMail

NOMINAL = 15  # examples of a global batch; a micro-batch has 4 to 6
Data = Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]


class Lanes:
    """The stream of one rank. at: micro-batches that it has taken."""

    ends_rounds = False

    def __init__(self, data: Data) -> None:
        self.data, self.at = data, 0

    def lane(self, index: int, of: int, most: int) -> Iterator[Any]:
        while True:
            x, t = self.data(index, self.at)
            self.at += 1
            yield SimpleNamespace(inputs=x, targets=t, tokens=len(x), last=False, round=self.at - 1, index=index)


class Slow:
    """Letters to servers that take their time, each pair of ranks its own; those of one sender to one server arrive in
    order."""

    def __init__(self, world: Any, transit: Callable[[int, int], int]) -> None:
        self.world, self.mail, self.transit = world, VirtualMail(world), transit
        self.take, self.close = self.mail.take, self.mail.close
        self.arrival: dict[int, int] = {}

    def post(self, to: int, box: str, head: dict[str, Any], body: torch.Tensor | None = None) -> None:
        if box != "server" or to == self.world.rank:
            return self.mail.post(to, box, head, body)
        hub, copy = self.world.hub, None if body is None else body.clone()
        at = max(self.arrival.get(to, 0), hub.holder.time + self.transit(self.world.rank, to))
        self.arrival[to] = at

        def travel() -> None:
            hub.holder.time = at
            hub.poll(lambda: False)
            self.mail.post(to, box, head, copy)

        self.world.spawn(travel, "letter")


def pushes(worker: int, workers: int, nominal: int = NOMINAL, data: Data = own_examples) -> Iterator[list[int]]:
    """Numbers of the micro-batches of each push, by the rule of its docstring."""
    share, numbers, n = max(1, nominal // workers), [], 0
    for k in itertools.count():
        count = len(data(worker, k)[0])
        numbers.append(k)
        n += count
        if n + count / 2 >= share:
            yield numbers
            numbers, n = [], 0


def serve(
    settings: Settings,
    size: int,
    tokens: int,
    *,
    optim: Any,
    nominal: int = NOMINAL,
    rate: Callable[[int], float] = lambda tokens: 1.0,
    milestones: Milestones | None = None,
    acts: bool = False,
    pace: Callable[[int, int], int] = lambda rank, number: 10,
    asks: dict[tuple[int, int], str] | None = None,
    begins: Callable[[int, int], None] = lambda rank, number: None,
    stop_at: int | None = None,
    states: list[Any] | None = None,
    model: Callable[[], nn.Module] = net,
    cost: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = loss,
    data: Data = own_examples,
    log: int = 1,
    act: int = 0,
    transit: Callable[[int, int], int] | None = None,
) -> list[Rig]:
    """Trains on `tokens`, or until a stop. log, act: tokens between light marks, and between frozen ones. pace:
    simulated seconds of a rank's micro-batch; asks: what a rank is asked for while it computes one; begins: called
    with each; transit: simulated seconds of a letter to a server; stop_at: leave at that mark with its state; states:
    of all ranks, to go on from."""
    wanted = milestones or Milestones((act,), (log,), tokens)

    def body(world: Any) -> Rig:
        out, net_ = Rig(), model()
        if transit is not None:
            world.mail = lambda: Slow(world, transit)
        part = ParameterServer(settings, nominal)
        part.milestones = wanted
        flat = Flat(net_, world.size, 1)
        part.attach(net_, flat, Update(optim, rate), None, part.between(world))  # type: ignore[arg-type]
        stream = Lanes(data)
        if states is not None:
            load(part, flat, states, world, model)
            stream.at = states[world.rank][1] if len(states) == size else 100
        number = 0
        for batch in part.feed(stream):  # type: ignore[arg-type]
            value = torch.zeros((), dtype=torch.float64)
            if batch.tokens:
                begins(world.rank, number)
                world.hub.holder.time += pace(world.rank, number)
                world.hub.poll(lambda: False)
                what = (asks or {}).get((world.rank, number))
                if what is not None:
                    world.asks.save = True
                    world.asks.stop |= what == "stop"
                number += 1
                value = cost(net_, batch.inputs, batch.targets)
                value.backward()
            commit = part.advance(batch, value.detach())
            if commit is None:
                continue
            out.commits.append(commit)
            if part.in_act:  # what acts do
                world.sum(torch.zeros(1), "act.begin").land()
                state = part.state()
                if acts or commit.asks.save:
                    with part.consensus():
                        out.kept.append(flatten(flat))
                if part.standing.mark == stop_at:
                    out.state = freeze(state), stream.at
                    break
                world.sum(torch.zeros(1), "act.end").land()
            if commit.tokens >= tokens or commit.asks.stop:
                break
        if stop_at is None:
            out.settled = part.settle()
            out.final = flatten(flat)
        out.sent, out.taken = world.bytes_sent, number
        return out

    return virtual.run(size, body)


def asks_heard(rigs: list[Rig]) -> list[tuple[int, Asks]]:
    return [(c.tokens, c.asks) for c in rigs[0].commits if c.asks.stop or c.asks.save]
