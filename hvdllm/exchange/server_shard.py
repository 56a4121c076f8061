"""One server's pieces of a parameter server: it applies pushes in the order of their tickets and answers pulls.

So a version is the same set of pushes on every server, whatever the order in which letters arrive, and each piece goes
through the same values as on any other cut. A pull is answered once the pieces have the version that it needs, with
all that have arrived by then: pieces of different servers may have different versions, and the answer says which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hvdllm.exchange.base import Update
from hvdllm.world.base import Letter, Mail


@dataclass
class Counted:
    """What Update needs of a push, or of a clock's."""

    tokens: float
    committed: int


class Shard:
    """theta: the weights over this server's spans, one after the other. servers: ranks; the first keeps the log."""

    def __init__(
        self,
        settings: Any,
        nominal: int,
        update: Update,
        theta: torch.Tensor,
        spans: Sequence[Any],
        mail: Mail,
        rank: int,
        servers: Sequence[int],
        workers: int,
    ) -> None:
        self.settings, self.nominal, self.update, self.theta, self.mail = settings, nominal, update, theta, mail
        self.rank, self.servers, self.workers = rank, servers, workers
        self.sizes = [span.stop - span.start for span in spans]
        self.pieces = list(theta.split(self.sizes))
        self.version = 0
        self.norm: float | None = None  # of the last mean gradient, where servers alone know it
        self._held: dict[int, Letter] = {}  # pushes by ticket
        self._pulls: list[Letter] = []
        self._read = dict.fromkeys(range(workers), 0)  # version that each worker computes at
        self._backups: dict[int, torch.Tensor] = {}  # and the weights, where they compensate
        self._squares: dict[int, dict[int, float]] = {}  # of the other servers, by version

    def start(self, version: int) -> None:
        """The weights are in place, of this version; so are the workers', if they say nothing else."""
        self.version = version
        self._read = dict.fromkeys(self._read, version)
        if self.settings.compensation:
            self._backups = {worker: self.theta.clone() for worker in self._read}

    # ------------------------------------------------------------------ the thread
    def serve(self) -> None:
        while True:
            letter = self.mail.take("server")
            head = letter.head
            if head["kind"] == "end":
                return
            if head["kind"] == "push":
                self._held[head["ticket"]] = letter
            elif head["kind"] == "read":
                self._has_read(letter.sender, head["version"], letter.body)
            else:  # a pull, or a rank that waits for this shard
                self._pulls.append(letter)
            self._apply()
            self._answer()

    def _has_read(self, worker: int, version: int, weights: torch.Tensor | None) -> None:
        self._read[worker] = version
        if weights is not None:
            self._backups[worker].copy_(weights)

    def _answer(self) -> None:
        for letter in [each for each in self._pulls if each.head["need"] <= self.version]:
            self._pulls.remove(letter)
            if letter.head["kind"] == "wait":
                self.mail.post(letter.sender, "reached", {})
                continue
            self._has_read(letter.sender, self.version, self.theta if self.settings.compensation else None)
            head = {"server": self.servers.index(self.rank), "version": self.version, "norm": self.norm}
            self.mail.post(letter.sender, "weights", head, self.theta)

    # ------------------------------------------------------------------ pushes
    def _apply(self) -> None:
        together = self.workers if self.settings.staleness == 0 else 1
        while all(self.version + 1 + i in self._held for i in range(together)):
            pushes = [self._held.pop(self.version + 1 + i) for i in range(together)]
            if self.settings.staleness == 0:
                self._clock(sorted(pushes, key=lambda each: each.sender))
            else:
                self._push(pushes[0])
            self.version += together

    def _clock(self, pushes: list[Letter]) -> None:
        """One step with the sum of all workers, in rank order. The norm is that of all servers' sums."""
        total, *rest = [self._gradient(letter) for letter in pushes]
        for gradient in rest:
            total += gradient
        heads = [letter.head for letter in pushes]
        counted = Counted(sum(head["n"] for head in heads), max(head["committed"] for head in heads))
        _, norm = self.update.step(self.pieces, list(total.split(self.sizes)), counted, self._all_squares)
        self.norm = norm.read()[0]
        if not math.isfinite(self.norm):  # it was masked; whose gradients they were, the workers have looked at
            self.mail.post(self.servers[0], "log", {"kind": "overflow", "norm": self.norm})

    def _push(self, letter: Letter) -> None:
        """A step of its own for one worker's gradient: with G / n, at the rate times n / batch_tokens."""
        head, gradient = letter.head, self._gradient(letter)
        if self.settings.compensation:
            moved = self.theta - self._backups[letter.sender]
            gradient.addcmul_(self._curvature(gradient, head["n"]), moved)
        share = head["n"] / self.nominal
        if self.settings.staleness_aware:
            share /= max(1, self.version - self._read[letter.sender])
        squares: Callable[[torch.Tensor], torch.Tensor] = lambda own: torch.full_like(own, head["squares"])  # noqa: E731
        counted = Counted(head["n"], head["committed"])
        self.update.step(self.pieces, list(gradient.split(self.sizes)), counted, squares, share)

    def _curvature(self, gradient: torch.Tensor, tokens: int) -> torch.Tensor:
        """What stands for the Hessian of a sum over so many tokens: λ G*G."""
        return gradient * gradient * self.settings.compensation

    def _gradient(self, letter: Letter) -> torch.Tensor:
        assert letter.body is not None
        return letter.body.to(self.theta.device)

    def _all_squares(self, own: torch.Tensor) -> torch.Tensor:
        """The sum over the servers, in their order."""
        if len(self.servers) == 1:
            return own
        head = {"version": self.version, "squares": own.item()}
        for server in self.servers:
            self.mail.post(server, "squares", head)
        known = self._squares.setdefault(self.version, {})
        while len(known) < len(self.servers):
            letter = self.mail.take("squares")
            self._squares.setdefault(letter.head["version"], {})[letter.sender] = letter.head["squares"]
        del self._squares[self.version]
        return torch.full_like(own, sum(known[server] for server in self.servers))
