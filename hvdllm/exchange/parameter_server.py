"""Parameter servers: pieces of the weights live on servers, each worker pushes its gradient and pulls weights when it
is ready, and a number says how stale a gradient may be.

    worker i:   G_i = sum of its gradients over about batch_tokens / W tokens, at the weights it has
                a ticket from the log;  its slices to all servers;  leave to begin from the log;  all pieces back
    server:     applies pushes in the order of their tickets (server_shard.py)

staleness 0 (synchronous): servers hold a clock's W pushes, add them up in rank order and make one step with the sum,
            theta = Update(theta, sum G_i / sum n_i): as exact as all-reduce under any optimizer, clipped by the norm of
            the sum. A pull waits for whole clocks.
s (bounded): each push is a step of its own, at the rate times n_i / batch_tokens, so that a global batch of pushes is
            one full step; clipped by its own norm and looked at by its worker. A worker begins only at most s clocks
            ahead of the slowest (server_log.py) and sees all that has a ticket by then: at most (W - 1) (2s + 1) other
            pushes come between the weights that a push was computed at and its own.
null (asynchronous): the same without a bound; a worker sees at least its own pushes.

A server's optimizer steps at every push, so momentum and Adam's means reach back W times fewer tokens than with
all-reduce.

Stability: workers in turn are descent that is W - 1 pushes late: on f = λx²/2 plain descent is stable for
0 < rate λ / W < 2 sin(π / (2 (2W - 1))), so the full rate may reach 2.0, 1.78, 1.67 / λ for 2, 4, 8 workers, π/2 in the
limit. Nothing is known of delays that vary. compensation λ (DC-ASGD, Zheng et al., 2017, arXiv 1609.08326):
G += λ G*G*(theta - theta_then), theta_then the weights that this worker last pulled, G*G/n in the place of the mean
loss's Hessian, so 1 takes what the noise of tokens says of it; a server keeps a copy of its pieces for each worker.
staleness_aware (Zhang et al., 2016, arXiv 1511.05950): the step is divided by its staleness in pushes.

Marks: milestones and asks have token stamps in the log and come one at a time, in their order, to every rank. A worker
with a gradient that has no ticket walks the loop on empty batches meanwhile; so does a rank that only serves. At
staleness 0 the weights and losses of a mark are the same bits in every run, acts or none.

Where: servers=shared, every rank trains and serves its part in a thread; servers=K, the last K ranks serve and do not
train, rank for rank larger parts. The first server keeps the log. Servers serve from the first `feed`, never from
`attach`: a faster rank must not reach one before it has loaded.

Bytes a worker and push: P b there and P b back, nothing of it hidden. Memory: the pieces once more and the update's
vectors / servers, a copy of each body that travels. A checkpoint has the pieces, and of each rank the gradient that had
no ticket; at another world size clocks begin at 0 and these gradients are dropped (`end` counts them).
CUDA: bodies travel through the host; not run on a GPU by the tests. More in
hvdllm/exchange/README.md, `parameter_server`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from hvdllm.device import Mark
from hvdllm.errors import RunError
from hvdllm.exchange.base import (
    Batch,
    Commit,
    Milestones,
    NotFinite,
    Nothing,
    Report,
    Settled,
    State,
    Stream,
    Update,
    Wire,
)  # fmt: skip
from hvdllm.exchange.meta import SLOT
from hvdllm.exchange.server_log import Counts, Log
from hvdllm.exchange.server_shard import Shard
from hvdllm.world.base import Asks, World


class Kept:
    """The micro-batches of one push, to be computed again where it was not finite."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def share(self, round: int, parts: int = 1) -> list[Batch]:
        return self.batches


class ParameterServer:
    """phase: what this rank does next: compute, push (its gradient has no ticket), begin (its next clock), serve."""

    copies = 1
    identical = False
    anchored = False
    marks_on_ask = True
    unlike = False  # it makes no difference: the servers' norms are all ranks'
    resized = ""

    def __init__(self, settings: Any, nominal: int) -> None:
        self.settings, self.nominal = settings, nominal
        self.watch: Callable[[int, str, Mark, Mark], None] | None = None
        self.milestones = Milestones(logs=(nominal,))
        self.counts = Counts()
        self.held: Report | None = None  # of the last commit
        self._n = self._micro_batches = 0  # of the gradient that has no ticket
        self._norm: float | None = None  # of the last mean gradient that is known
        self._sum, self._squares = 0.0, 0.0  # of the gradient without a ticket: its loss, its squared norm
        self._seen = [0.0, 0]  # mean and least version of the weights here
        self._slot = dict.fromkeys(SLOT, 0.0)  # not yet said
        self._kept = Kept()
        self._open = False  # is the norm of `held` still to come?
        self._serving = self._in_act = self._resumed = self._bad = False
        self._said = time.monotonic()  # when the log last heard of this rank

    @property
    def tokens(self) -> int:
        return self.counts.tokens

    @property
    def step(self) -> int:
        """Of the optimizer, in this run: marks come where they are asked for, and count nothing."""
        return self.counts.steps - self.counts.trunk

    # ------------------------------------------------------------------ who does what
    def between(self, world: World) -> World:
        return world

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        self.flat, self.update, self.world = flat, update, world
        self.device = flat.x.device
        self.workers = world.size - self.settings.dedicated
        self.servers = list(range(self.workers if self.settings.dedicated else 0, world.size))
        self.parts = cut(flat, len(self.servers))  # of each server, one range of the map
        self.log = self.servers[0]
        self.counts.clocks = [0] * self.workers
        self.phase = "compute" if world.rank < self.workers else "serve"
        self.mail = world.mail()
        part = self.parts[self.servers.index(world.rank)] if world.rank in self.servers else slice(0, 0)
        self.owned = [
            span._replace(start=max(span.start, part.start), stop=min(span.stop, part.stop))
            for span in flat.pieces(0, 1)
            if max(span.start, part.start) < min(span.stop, part.stop)
        ]
        update.attach(flat, self.owned)
        self._part, self.theta = part, flat.x[part].clone()
        self.shard = None
        if world.rank in self.servers:
            self.shard = Shard(
                self.settings, self.nominal, update, self.theta, self.owned, self.mail, world.rank, self.servers,
                self.workers,
            )  # fmt: skip
        self._loss = torch.zeros((), dtype=torch.float64, device=self.device)
        return model

    def disarm(self) -> None:
        """There are no hooks."""

    def _serve(self) -> None:
        """Once, from the first `feed`."""
        self._serving = True
        if self.shard is not None:
            self.shard.start(self.counts.pushes)
            self.world.spawn(self.shard.serve, "server")
        if self.world.rank == self.log:
            self.world.spawn(self._keep_log, "log")
        if self._resumed and self.world.rank < self.workers:  # a server does not know what we had read
            weights = self.flat.x if self.settings.compensation else None
            for server, part in zip(self.servers, self.parts, strict=True):
                head = {"kind": "read", "version": self._seen[1]}
                self.mail.post(server, "server", head, None if weights is None else weights[part])

    def _keep_log(self) -> None:
        counts = Counts(**asdict(self.counts))
        log = Log(self.workers, self.world.size, self.settings.staleness, self.milestones, counts)
        lease = self.settings.lease_s

        def look() -> None:
            rank = log.silent(time.monotonic(), lease)
            if rank is not None:
                raise RunError(
                    f"rank {rank} has said nothing for {lease:g} s (exchange.lease_s): it stands still or is gone, and "
                    "the others' clocks cannot go on without it; look at its host, then resume from the last checkpoint"
                )

        while True:
            letter = self.mail.take("log", look)
            if letter.head["kind"] == "end":
                return
            log.hear(letter.sender, letter.head, time.monotonic())
            for rank, answer in log.answers():
                self.mail.post(rank, "answer", answer)
            look()

    # ------------------------------------------------------------------ the loop
    def feed(self, stream: Stream) -> Iterator[Batch]:
        share = max(1, self.nominal // self.workers)
        lane = stream.lane(self.world.rank, self.workers, share) if self.phase != "serve" else None
        if not self._serving:
            self._serve()
        self._cpu = time.process_time()
        self._begin = Mark(self.device)
        while True:
            if self._in_act:
                self._in_act = False
                self._cpu = time.process_time()
                self._post_log("left")
            if self.phase != "compute":
                yield Nothing()
                continue
            assert lane is not None
            batch = next(lane)
            # As near to its share as whole micro-batches come.
            batch.last = self._n + 1.5 * batch.tokens >= share
            self._kept.batches.append(batch)
            yield batch

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        if batch.tokens:
            self._loss += loss
            self._n += batch.tokens
            self._micro_batches += 1
            if not batch.last:
                return None
            self._close()
        if self.phase == "serve":
            return self._enter(self._request("serve")["mark"])
        if self.phase == "push":
            answer = self._ask_for_ticket()
            if "mark" in answer:
                return self._enter(answer["mark"])
            self._push(answer)
        answer = self._request("begin")
        if "mark" in answer:
            return self._enter(answer["mark"])
        self._pull(answer["need"])
        return None

    def _close(self) -> None:
        """The gradient is whole: the one host read of a push."""
        self._squares = torch.linalg.vector_norm(self.flat.g).double().square().item()
        self._sum = self._loss.item()
        self._loss.zero_()
        norm = math.sqrt(self._squares) / self._n
        self._bad = not math.isfinite(norm)
        if self.settings.staleness != 0 or self._bad:
            self._norm = norm
        self._passed("compute", self._begin)
        self._slot["micro_batches"] += self._micro_batches
        self._micro_batches = 0
        self.phase = "push"

    def _ask_for_ticket(self) -> dict[str, Any]:
        if self._bad:
            return self._request("bad", norm=self._norm)
        return self._request("push", n=self._n, loss=self._sum, norm=self._norm, seen=self._seen)

    def _push(self, ticket: dict[str, Any]) -> None:
        since = Mark(self.device)
        head = {"kind": "push", "n": self._n, "squares": self._squares, **ticket}
        for server, part in zip(self.servers, self.parts, strict=True):
            self.mail.post(server, "server", head, self.flat.g[part])
        self.flat.g.zero_()
        self._n, self._kept.batches = 0, []
        self.phase = "begin"
        self._passed("blocked", since)

    def _pull(self, need: int) -> None:
        since = Mark(self.device)
        for server in self.servers:
            self.mail.post(server, "server", {"kind": "pull", "need": need})
        versions = []
        for _ in self.servers:
            letter = self.mail.take("weights", self._pass_on_asks)
            versions.append(letter.head["version"])
            if letter.head["norm"] is not None:
                self._norm = letter.head["norm"]
                self._complete(self._norm)
            self.flat.x[self.parts[letter.head["server"]]].copy_(letter.body)
        self._seen = [sum(versions) / len(versions), min(versions)]
        self.phase = "compute"
        self._passed("blocked", since)
        self._begin = Mark(self.device)

    def _complete(self, norm: float) -> None:
        """Of the clock that closed the last commit, which at staleness 0 the servers know after it: it comes with the
        first weights behind the mark."""
        if self._open and self.held is not None:
            self.held, self._open = replace(self.held, grad_norm=norm), False

    def _passed(self, lane: str, since: Mark) -> None:
        """This lasted until now. While compute stands still something travels, and at no other time."""
        if lane == "blocked" and self.world.size == 1:
            return
        now = Mark(self.device)
        for name in (lane, "flight") if lane == "blocked" else (lane,):
            self._slot[f"{name}_s"] += since.until(now)
            if self.watch is not None:
                self.watch(self.step + 1, name, since, now)

    # ------------------------------------------------------------------ talking to the log
    def _request(self, kind: str, **said: Any) -> dict[str, Any]:
        """Waits for the answer."""
        since = Mark(self.device)
        now = time.process_time()
        self._slot["cpu_s"], self._cpu = self._slot["cpu_s"] + now - self._cpu, now
        slot, self._slot = self._slot, dict.fromkeys(SLOT, 0.0)
        self._post_log(kind, **slot, **said)
        answer = self.mail.take("answer", self._pass_on_asks).head
        if self.phase != "serve":
            self._passed("blocked", since)
        return answer

    def _post_log(self, kind: str, **said: Any) -> None:
        asks, self._said = self.world.asks.take(), time.monotonic()
        self.mail.post(self.log, "log", {"kind": kind, "stop": asks.stop, "save": asks.save, **said})

    def _pass_on_asks(self) -> None:
        """A rank that waits can be signalled too, one that only serves above all. And it lives: who waits for a server
        that stands still is not the one that does."""
        if self.world.asks.stop or self.world.asks.save or time.monotonic() - self._said > self.settings.lease_s / 4:
            self._post_log("ask")

    def _enter(self, mark: dict[str, Any]) -> Commit:
        if mark["bad"] is not None:
            raise NotFinite(self.step + 1, [0] if self._bad else [], mark["bad"], stream=self._kept, again=True)
        if mark["frozen"]:
            if self.shard is not None:  # until it has applied all that came before
                self.mail.post(self.world.rank, "server", {"kind": "wait", "need": mark["pushes"]})
                self.mail.take("reached", self._pass_on_asks)
            self._in_act = True
        before, self.held, self._open = self.held, Report(**mark["report"]), self.settings.staleness == 0
        updates = mark["steps"] - self.counts.steps
        self.counts = Counts(**{name: mark[name] for name in asdict(self.counts)})
        lr, (mean, most) = self.update.rate(self.tokens), mark["staleness"]
        return Commit(self.tokens, self.step, lr, mean, before, Asks(mark["stop"], mark["save"]), most, updates)

    # ------------------------------------------------------------------ acts: all ranks stand in one frozen mark
    def _collect(self) -> None:
        """All pieces into the model. Collective."""
        self.flat.x.copy_(self.world.gather(self.theta, "act.weights").land())  # ranges in the order of ranks

    @contextmanager
    def consensus(self) -> Iterator[int | None]:
        mine = self.flat.x.clone()
        self._collect()
        try:
            yield None
        finally:
            self.flat.x.copy_(mine)

    def settle(self) -> Settled:
        self._collect()
        left = self.world.sum(torch.tensor([float(self._n)], dtype=torch.float64), "act.unpushed").land().item()
        if self._serving:
            if self.shard is not None:
                self.mail.post(self.world.rank, "server", {"kind": "end"})
            if self.world.rank == self.log:
                self.mail.post(self.world.rank, "log", {"kind": "end"})
        self.mail.close()
        known = self.shard.norm if self.shard is not None and self.shard.norm is not None else math.nan
        norms = self.world.gather(torch.tensor([known], dtype=torch.float64), "act.norm").land().tolist()
        if own := [norm for norm in norms if not math.isnan(norm)]:
            self._complete(own[0])
        report, self.held = self.held, None
        return Settled(report, 0, self.counts.dropped + int(left))

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        _, vectors = self.update.state()
        shared = {
            "tokens": self.tokens, "step": self.step, "steps": self.counts.steps, "counts": asdict(self.counts),
            "held": asdict(self.held) if self.held is not None else None,
        }  # fmt: skip
        mine = {
            "phase": self.phase, "n": self._n, "loss": self._sum, "squares": self._squares, "norm": self._norm,
            "seen": self._seen, "slot": self._slot, "known": self.shard.norm if self.shard is not None else None,
            "frozen_at": self.update.state()[0].get("frozen_at"),
        }  # fmt: skip
        whole = self.flat.pieces(0, 1)
        local = {"model": (whole, self.flat.x), "gradient": (whole, self.flat.g)} if self.phase == "push" else {}
        return State(shared, self.owned, {"model": self.theta, **vectors}, mine, {}, {}, local)

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        """Begins, attached and not yet trained, with a trunk's weights; where moments are given, with its optimizer,
        which has made so many steps. Vectors over the map."""
        self.flat.x.copy_(model)
        self.theta.copy_(model[self._part])
        if moments:
            self.counts.steps = self.counts.trunk = steps
            self.update.load({"steps": steps}, {name: vector[self._part] for name, vector in moments.items()})

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        shared = state.shared
        self.counts = Counts(**shared["counts"])
        self.counts.steps = shared["steps"]
        self.held = Report(**shared["held"]) if shared["held"] else None
        self.flat.x.copy_(state.sharded["model"])
        self.theta.copy_(self.flat.x[self._part])
        self._open = self.settings.staleness == 0
        if self.shard is not None:  # the norm of its last step, which the next pull will ask for
            self.shard.norm = next((each["known"] for each in mine if each.get("known") is not None), None)
        names = self.update.state()[1]
        frozen = next((each["frozen_at"] for each in mine if each.get("frozen_at") is not None), None)  # of a server
        self.update.load(
            {"steps": shared["steps"], "frozen_at": frozen}, {name: state.sharded[name][self._part] for name in names}
        )
        if len(mine) != self.world.size:
            self.counts.clocks = [0] * self.workers
            lost = sum(each["n"] for each in mine)
            self.counts.dropped += lost
            self.resized = f"gradients of {lost:,} tokens that no server had yet were dropped" if lost else ""
            if self.held is not None:
                self.held = self.held.elsewhere(self.world.size)
            self._seen = [float(self.counts.pushes), self.counts.pushes]
            return
        own = mine[self.world.rank]
        self.phase, self._n, self._sum, self._squares = own["phase"], own["n"], own["loss"], own["squares"]
        self._norm, self._seen, self._slot = own["norm"], list(own["seen"]), dict(own["slot"])
        self._resumed = True
        if self.phase == "push":
            self.flat.x.copy_(state.local["model"])
            self.flat.g.copy_(state.local["gradient"])


def cut(flat: Any, of: int) -> list[slice]:
    """The map in `of` ranges of about equal length, at multiples of 64 bytes."""
    unit = 64 // flat.x.element_size()
    units = len(flat.x) // unit
    borders = [units * i // of * unit for i in range(of + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(borders)]
