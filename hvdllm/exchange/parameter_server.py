"""Parameter servers: pieces of the weights live on servers, and each worker pushes its gradient and pulls weights when
it is ready. The setting staleness bounds how stale a gradient may be.

    worker i:   G_i = sum of its gradients over about batch_tokens / W tokens, at the weights it has
                a ticket from the log;  its slices to all servers;  leave to begin from the log;  all pieces back
    server:     applies pushes in the order of their tickets (server_shard.py)

staleness=0 (synchronous): servers hold the W pushes of a clock, add them up in rank order and make one step with the
    sum, theta = Update(theta, sum G_i / sum n_i). This is as exact as all-reduce under any optimizer; clipping goes by
    the norm of the sum. A pull waits for whole clocks.
staleness=s (bounded): each push is a step of its own, at the rate times n_i / batch_tokens, so that a global batch of
    pushes makes one full step. A push is clipped by its own norm, and its worker checks that it is finite. A worker
    begins only when it is at most s clocks ahead of the slowest one (server_log.py), and then has all pushes that have
    a ticket. At most (W - 1) (2s + 1) other pushes therefore come between the weights that a push was computed at and
    the push itself.
staleness=null (asynchronous): the same without a bound. A worker has at least its own pushes.

The optimizer of a server steps at every push, so momentum and Adam's means reach back over W times fewer tokens than
with all-reduce.

Stability: workers that push in turn are descent that is W - 1 pushes late. On f = λx²/2 plain descent is stable for 0 <
rate λ / W < 2 sin(π / (2 (2W - 1))), so the full rate may reach 2.0, 1.78, 1.67 / λ for 2, 4, 8 workers, and π/2 / λ in
the limit. For delays that vary no bound is known.

compensation λ (DC-ASGD, Zheng et al., 2017, arXiv 1609.08326): G += λ G*G*(theta - theta_then), where theta_then are
the weights that this worker pulled last, and G*G/n takes the place of the mean loss's Hessian, so that 1 is the
estimate from the noise of tokens. A server keeps a copy of its pieces for each worker.

staleness_aware (Zhang et al., 2016, arXiv 1511.05950): the step is divided by its staleness in pushes.

Marks: milestones and asks get a number of tokens in the log and come to every rank one at a time, in that order. A
worker whose gradient has no ticket walks the loop on empty batches meanwhile, and so does a rank that only serves. At
staleness 0 the weights and losses of a mark are the same bits in every run, with or without acts.

Where: with servers=shared every rank trains, and serves its part in a thread. With servers=K the last K ranks serve and
do not train, each a larger part. The first server keeps the log. Servers begin to serve at the first `feed` and not in
`attach`, because a faster rank must not reach one before it has loaded.

Bytes a worker and push: P b there and P b back, nothing of it hidden. Memory: the pieces once more and the update's
vectors / servers, and a copy of each body that travels. A checkpoint has the pieces, and of each rank the gradient that
had no ticket. At another world size clocks begin at 0 and these gradients are dropped (the `end` record counts them).
CUDA: bodies travel through the host; the tests do not run this on a GPU.

More in hvdllm/exchange/README.md, `parameter_server`.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hvdllm.device import Mark
from hvdllm.errors import RunError, UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import (
    Batch,
    Commit,
    NotFinite,
    Nothing,
    Report,
    Settled,
    State,
    Stream,
    Update,
    Values,
    Wire,
)  # fmt: skip
from hvdllm.exchange.common import Common
from hvdllm.exchange.server_log import Standing, UpdateLog
from hvdllm.exchange.server_shard import ServedSlice
from hvdllm.exchange.tally import RankReport
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Flat
from hvdllm.world.base import Asks, World


class PushBatches:
    """The micro-batches of one push, to be computed again where its gradient was not finite."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def share(self, round: int, parts: int = 1) -> list[Batch]:
        return self.batches


@dataclass
class Worker:
    """What this rank does, and the gradient of it that has no ticket yet.

    phase: what it does next: compute, push (its gradient has no ticket), begin (its next clock) or serve
    tokens, micro_batches: that the gradient has so far
    loss, squares: sum of its token losses, and its squared norm, once it is whole
    bad: the gradient is not finite
    norm: of the last mean gradient that is known here
    seen: mean and least version of the weights here
    begin, cpu_s: when it began to compute, and the CPU seconds of the process when they were last read
    kept: the micro-batches that the gradient was computed on
    resumed: it goes on from a checkpoint, so that no server knows what weights it has
    """

    begin: Mark
    phase: str = "compute"
    tokens: int = 0
    micro_batches: int = 0
    loss: float = 0.0
    squares: float = 0.0
    bad: bool = False
    norm: float | None = None
    seen: list[float] = field(default_factory=lambda: [0.0, 0])
    cpu_s: float = 0.0
    kept: PushBatches = field(default_factory=PushBatches)
    resumed: bool = False


class Places:
    """Who trains and who serves which part of the flat vector.

    workers: the first ranks, how many; servers: ranks, of which the first keeps the log
    parts: of each server, one range of the flat vector; own: that of this rank, empty where it serves none
    """

    def __init__(self, flat: Flat, dedicated: int, world: World) -> None:
        self.workers = world.size - dedicated
        self.servers = list(range(self.workers if dedicated else 0, world.size))
        self.parts = ranges(flat, len(self.servers))
        self.serves = world.rank in self.servers
        self.own = self.parts[self.servers.index(world.rank)] if self.serves else slice(0, 0)
        self.log = self.servers[0]
        self.spans = [
            span._replace(start=max(span.start, self.own.start), stop=min(span.stop, self.own.stop))
            for span in flat.pieces(0, 1)
            if max(span.start, self.own.start) < min(span.stop, self.own.stop)
        ]


class Desk:
    """Where this rank talks to the log, and to the servers by `mail`. lease_s: how long it may be silent."""

    def __init__(self, world: World, log: int, lease_s: float) -> None:
        self.world, self.log, self.lease_s = world, log, lease_s
        self.mail = world.mail()
        self._posted = time.monotonic()

    def post(self, kind: str, **said: Any) -> None:
        asks, self._posted = self.world.asks.take(), time.monotonic()
        self.mail.post(self.log, "log", {"kind": kind, "stop": asks.stop, "save": asks.save, **said})

    def request(self, kind: str, **said: Any) -> Values:
        """Posts and waits for the answer."""
        self.post(kind, **said)
        return self.mail.take("answer", self.meanwhile).head

    def meanwhile(self) -> None:
        """While it waits. A rank that waits can be signalled too, one that only serves above all. It also has to tell
        that it lives: whoever waits for a server that stands still is not the one that does."""
        asks = self.world.asks
        if asks.stop or asks.save or time.monotonic() - self._posted > self.lease_s / 4:
            self.post("ask")

    def end(self, serves: bool) -> None:
        """Ends the threads of this rank."""
        if serves:
            self.mail.post(self.world.rank, "server", {"kind": "end"})
        if self.world.rank == self.log:
            self.mail.post(self.world.rank, "log", {"kind": "end"})


class ParameterServer(Common[exchanges.ParameterServer]):
    """standing: of the whole run, at the last mark. in_act: this rank stands in the acts of a frozen mark."""

    marks_on_ask = True

    def __init__(self, settings: exchanges.ParameterServer, nominal: int) -> None:
        super().__init__(settings, nominal)
        self.milestones = replace(self.milestones, logs=(nominal,))
        self.standing = Standing()
        self.in_act = False
        self._serving = False
        self._norm_due = False  # the norm of the last commit is still to come

    # ------------------------------------------------------------------ who does what
    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire | None, world: World) -> nn.Module:
        """wire: a push is one rank's gradient and no sum, so that only a wire that codes nothing fits. Raises UserError
        for any other."""
        if wire is not None and type(wire) is not Plain:
            raise UserError(
                "exchange=parameter_server sends pushes as they are, and no sum that a wire could carry: take "
                "wire=fp32 without wire.hierarchical"
            )
        self.flat, self.update, self.world = flat, update, world
        self.places = places = Places(flat, self.settings.dedicated, world)
        self.standing.clocks = [0] * places.workers
        self.worker = Worker(Mark(flat.x.device), "compute" if world.rank < places.workers else "serve")
        self.desk = Desk(world, places.log, self.settings.lease_s)
        update.attach(flat, places.spans)
        self.theta = flat.x[places.own].clone()
        self.shard = None
        if places.serves:
            self.shard = ServedSlice(
                self.settings, self.nominal, update, self.theta, places.spans, self.desk.mail, world.rank,
                places.servers, places.workers,
            )  # fmt: skip
        self._loss = torch.zeros((), dtype=torch.float64, device=flat.x.device)
        return model

    def _serve(self) -> None:
        """Begins to serve; called once, by the first `feed`."""
        self._serving = True
        if self.shard is not None:
            self.shard.start(self.standing.pushes)
            self.world.spawn(self.shard.serve, "server")
        if self.world.rank == self.places.log:
            self.world.spawn(self._keep_log, "log")
        if self.worker.resumed and self.worker.phase != "serve":
            weights = self.flat.x if self.settings.compensation else None
            for server, part in zip(self.places.servers, self.places.parts, strict=True):
                head = {"kind": "read", "version": self.worker.seen[1]}
                self.desk.mail.post(server, "server", head, None if weights is None else weights[part])

    def _keep_log(self) -> None:
        standing = Standing(**asdict(self.standing))
        log = UpdateLog(self.places.workers, self.world.size, self.settings.staleness, self.milestones, standing)
        lease, mail = self.settings.lease_s, self.desk.mail

        def look() -> None:
            rank = log.silent(time.monotonic(), lease)
            if rank is not None:
                raise RunError(
                    f"rank {rank} has said nothing for {lease:g} s (exchange.lease_s): it stands still or is gone, and "
                    "the others' clocks cannot go on without it; look at its host, then resume from the last checkpoint"
                )

        while True:
            letter = mail.take("log", look)
            if letter.head["kind"] == "end":
                return
            log.hear(letter.sender, letter.head, time.monotonic())
            for rank, answer in log.answers():
                mail.post(rank, "answer", answer)
            look()

    # ------------------------------------------------------------------ the loop
    def feed(self, stream: Stream) -> Iterator[Batch]:
        share, worker = max(1, self.nominal // self.places.workers), self.worker
        lane = stream.lane(self.world.rank, self.places.workers, share) if worker.phase != "serve" else None
        if not self._serving:
            self._serve()
        worker.cpu_s, worker.begin = time.process_time(), Mark(self.flat.x.device)
        while True:
            if self.in_act:
                self.in_act = False
                worker.cpu_s = time.process_time()
                self.desk.post("left")
            if worker.phase != "compute":
                yield Nothing()
                continue
            assert lane is not None
            batch = next(lane)
            if batch.tokens:
                # As near to its share as whole micro-batches come.
                batch.last = batch.last if stream.ends_rounds else worker.tokens + 1.5 * batch.tokens >= share
                worker.kept.batches.append(batch)
            yield batch

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        worker = self.worker
        if batch.tokens:
            self._loss += loss
            worker.tokens += batch.tokens
            worker.micro_batches += 1
            if not batch.last:
                return None
            self._complete_gradient()
        elif worker.phase == "compute":  # nothing has arrived that it could train on
            answer = self._request("idle")
            return self._enter(answer["mark"]) if "mark" in answer else None
        if worker.phase == "serve":
            return self._enter(self._request("serve")["mark"])
        if worker.phase == "push":
            answer = self._ask_for_ticket()
            if "mark" in answer:
                return self._enter(answer["mark"])
            self._push(answer)
        answer = self._request("begin")
        if "mark" in answer:
            return self._enter(answer["mark"])
        self._pull(answer["need"])
        return None

    def _complete_gradient(self) -> None:
        """The gradient is whole: the one host read of a push."""
        worker = self.worker
        worker.squares = torch.linalg.vector_norm(self.flat.g).double().square().item()
        worker.loss = self._loss.item()
        self._loss.zero_()
        norm = math.sqrt(worker.squares) / worker.tokens
        worker.bad = not math.isfinite(norm)
        if self.settings.staleness != 0 or worker.bad:
            worker.norm = norm
        self._passed("compute", worker.begin)
        self.tally.own.micro_batches += worker.micro_batches
        worker.micro_batches = 0
        worker.phase = "push"

    def _ask_for_ticket(self) -> Values:
        worker = self.worker
        if worker.bad:
            return self._request("bad", norm=worker.norm)
        return self._request("push", n=worker.tokens, loss=worker.loss, norm=worker.norm, seen=worker.seen)

    def _push(self, ticket: Values) -> None:
        worker, since = self.worker, Mark(self.flat.x.device)
        head = {"kind": "push", "n": worker.tokens, "squares": worker.squares, **ticket}
        for server, part in zip(self.places.servers, self.places.parts, strict=True):
            self.desk.mail.post(server, "server", head, self.flat.g[part])
        self.flat.g.zero_()
        worker.tokens, worker.kept.batches = 0, []
        worker.phase = "begin"
        self._passed("blocked", since)

    def _pull(self, need: int) -> None:
        worker, since = self.worker, Mark(self.flat.x.device)
        for server in self.places.servers:
            self.desk.mail.post(server, "server", {"kind": "pull", "need": need})
        versions = []
        for _ in self.places.servers:
            letter = self.desk.mail.take("weights", self.desk.meanwhile)
            assert letter.body is not None
            versions.append(letter.head["version"])
            if letter.head["norm"] is not None:
                worker.norm = float(letter.head["norm"])
                self._complete_report(worker.norm)
            self.flat.x[self.places.parts[letter.head["server"]]].copy_(letter.body)
        worker.seen = [sum(versions) / len(versions), min(versions)]
        worker.phase = "compute"
        self._passed("blocked", since)
        worker.begin = Mark(self.flat.x.device)

    def _complete_report(self, norm: float) -> None:
        """At staleness 0 only the servers know the norm of the clock that closed the last commit, and they know it
        later: it comes with the first weights that are pulled after the mark."""
        if self._norm_due and self.tally.held is not None:
            self.tally.held, self._norm_due = replace(self.tally.held, grad_norm=norm), False

    def _passed(self, lane: str, since: Mark) -> None:
        """This lasted until now. While compute stands still something travels, and at no other time."""
        if lane == "blocked" and self.world.size == 1:
            return
        now = Mark(self.flat.x.device)
        for name in (lane, "flight") if lane == "blocked" else (lane,):
            self.tally.passed(name, since, now)
        self.tally.read_seconds()

    def _request(self, kind: str, **said: Any) -> Values:
        """Tells the log what this rank has done, asks for something and waits for the answer."""
        since, now, own = Mark(self.flat.x.device), time.process_time(), self.tally.own
        own.cpu_s, self.worker.cpu_s = own.cpu_s + now - self.worker.cpu_s, now
        self.tally.own = RankReport()
        answer = self.desk.request(kind, **own.slot(), **said)
        if self.worker.phase != "serve":
            self._passed("blocked", since)
        return answer

    def _enter(self, mark: Values) -> Commit:
        if mark["bad"] is not None:
            rounds = [0] if self.worker.bad else []
            raise NotFinite(self.step + 1, rounds, mark["bad"], stream=self.worker.kept, again=True)
        if mark["frozen"]:
            if self.shard is not None:  # until it has applied all that came before
                self.desk.mail.post(self.world.rank, "server", {"kind": "wait", "need": mark["pushes"]})
                self.desk.mail.take("reached", self.desk.meanwhile)
            self.in_act = True
        before = self.standing
        self.standing = Standing(**{name: mark[name] for name in asdict(before)})
        self._norm_due = self.settings.staleness == 0
        (mean, most), asks = mark["staleness"], Asks(mark["stop"], mark["save"])
        return self.tally.commit(
            self.standing.tokens - before.tokens, self.update.rate(self.standing.tokens), Report(**mark["report"]),
            asks, mean, most, self.standing.steps - before.steps,
        )  # fmt: skip

    # ------------------------------------------------------------------ acts: all ranks stand in one frozen mark
    def _collect(self) -> None:
        """Puts all pieces into the model. Collective."""
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
        tokens = torch.tensor([float(self.worker.tokens)], dtype=torch.float64)
        left = self.world.sum(tokens, "act.unpushed").land().item()
        if self._serving:
            self.desk.end(self.shard is not None)
        self.desk.mail.close()
        known = self.shard.norm if self.shard is not None and self.shard.norm is not None else math.nan
        norms = self.world.gather(torch.tensor([known], dtype=torch.float64), "act.norm").land().tolist()
        if own := [norm for norm in norms if not math.isnan(norm)]:
            self._complete_report(own[0])
        report, self.tally.held = self.tally.held, None
        return Settled(report, 0, self.standing.dropped + int(left))

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> State:
        values, vectors = self.update.state()
        worker = self.worker
        shared = {**self.tally.state(), "steps": self.standing.steps, "counts": asdict(self.standing)}
        mine = {
            "phase": worker.phase, "n": worker.tokens, "loss": worker.loss, "squares": worker.squares,
            "norm": worker.norm, "seen": worker.seen, "slot": self.tally.own.slot(),
            "known": self.shard.norm if self.shard is not None else None, "frozen_at": values.get("frozen_at"),
        }  # fmt: skip
        whole = self.flat.pieces(0, 1)
        local = {"model": (whole, self.flat.x), "gradient": (whole, self.flat.g)} if worker.phase == "push" else {}
        return State(shared, self.places.spans, {"model": self.theta, **vectors}, mine, {}, {}, local)

    def start(self, model: torch.Tensor, moments: dict[str, torch.Tensor], steps: int) -> None:
        self.flat.x.copy_(model)
        self.theta.copy_(model[self.places.own])
        if moments:
            self.standing.steps = self.standing.trunk = steps
            self.update.load({"steps": steps}, {name: vector[self.places.own] for name, vector in moments.items()})

    def load(self, state: State, mine: list[Values]) -> None:
        shared, own, size = state.shared, self.places.own, self.world.size
        same = len(mine) == size
        self.tally.load(shared, None if same else size)
        self.standing = Standing(**shared["counts"])
        self.standing.steps = shared["steps"]
        self.tally.step = self.standing.steps - self.standing.trunk
        self.flat.x.copy_(state.sharded["model"])
        self.theta.copy_(self.flat.x[own])
        self._norm_due = self.settings.staleness == 0
        if self.shard is not None:  # the norm of its last step, which the next pull will ask for
            self.shard.norm = next((each["known"] for each in mine if each.get("known") is not None), None)
        names = self.update.state()[1]
        frozen = next((each["frozen_at"] for each in mine if each.get("frozen_at") is not None), None)  # of a server
        self.update.load(
            {"steps": shared["steps"], "frozen_at": frozen}, {name: state.sharded[name][own] for name in names}
        )
        if not same:
            self.standing.clocks = [0] * self.places.workers
            lost = sum(each["n"] for each in mine)
            self.standing.dropped += lost
            self.resized = f"gradients of {lost:,} tokens that no server had yet were dropped" if lost else ""
            self.worker.seen = [float(self.standing.pushes), self.standing.pushes]
            return
        self._load_worker(mine[self.world.rank])
        if self.worker.phase == "push":
            self.flat.x.copy_(state.local["model"])
            self.flat.g.copy_(state.local["gradient"])

    def _load_worker(self, own: Values) -> None:
        worker = self.worker
        worker.phase, worker.tokens, worker.loss, worker.squares = own["phase"], own["n"], own["loss"], own["squares"]
        worker.norm, worker.seen, worker.resumed = own["norm"], list(own["seen"]), True
        self.tally.own = RankReport(**own["slot"])


def ranges(flat: Flat, of: int) -> list[slice]:
    """The flat vector in `of` ranges of about equal length, at multiples of 64 bytes."""
    unit = 64 // flat.x.element_size()
    units = len(flat.x) // unit
    borders = [units * i // of * unit for i in range(of + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(borders)]
