"""The pieces of one server: it applies pushes in the order of their tickets and answers pulls.

A version is therefore the same set of pushes on every server, in whatever order letters arrive, and each piece goes
through the same values however the weights are dealt to servers. A pull is answered once the pieces have the version
that it needs, and then with all pushes that have arrived. Pieces of different servers may have different versions; the
answer says which.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Divisor, Update
from hvdllm.flat import Span
from hvdllm.world.base import Letter, Mail


@dataclass
class Seen:
    """The weights that a worker computes at: their version, and the weights themselves where it compensates."""

    version: int
    weights: torch.Tensor | None = None


class ServedSlice:
    """theta: the weights over this server's spans, one after the other. servers: ranks, of which the first keeps the
    log. norm: of the last mean gradient, where only servers know it."""

    def __init__(
        self, settings: exchanges.ParameterServer, nominal: int, update: Update, theta: torch.Tensor, spans: list[Span],
        mail: Mail, rank: int, servers: list[int], workers: int,
    ) -> None:  # fmt: skip
        self.settings, self.nominal, self.update, self.theta, self.mail = settings, nominal, update, theta, mail
        self.rank, self.servers = rank, servers
        self.pieces = list(torch.split(theta, [span.stop - span.start for span in spans]))
        self.version = 0
        self.norm: float | None = None
        self._held: dict[int, Letter] = {}  # pushes by ticket
        self._pulls: list[Letter] = []
        self._seen = {worker: Seen(0) for worker in range(workers)}
        self._squares: dict[int, dict[int, float]] = {}  # of the other servers, by version

    def start(self, version: int) -> None:
        """The weights are in place and have this version; those of the workers do too, unless they tell otherwise."""
        self.version = version
        for worker in self._seen:
            self._seen[worker] = Seen(version, self.theta.clone() if self.settings.compensation else None)

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
            else:  # a pull, or a rank that waits until this shard has a version
                self._pulls.append(letter)
            self._apply()
            self._answer()

    def _has_read(self, worker: int, version: int, weights: torch.Tensor | None) -> None:
        seen = self._seen[worker]
        seen.version = version
        if weights is not None and seen.weights is not None:
            seen.weights.copy_(weights)

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
        together = len(self._seen) if self.settings.staleness == 0 else 1
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
        divisor = Divisor(sum(head["n"] for head in heads), max(head["committed"] for head in heads))
        _, norm = self.update.step(self.pieces, self._slices(total), divisor, self._all_squares)
        self.norm = norm.read()[0]
        if not math.isfinite(self.norm):  # it was masked; the workers have looked at their own gradients
            self.mail.post(self.servers[0], "log", {"kind": "overflow", "norm": self.norm})

    def _push(self, letter: Letter) -> None:
        """A step of its own for one worker's gradient: with G / n, at the rate times n / batch_tokens."""
        head, gradient = letter.head, self._gradient(letter)
        seen = self._seen[letter.sender]
        if seen.weights is not None:
            gradient.addcmul_(self._curvature(gradient, head["n"]), self.theta - seen.weights)
        share = head["n"] / self.nominal
        if self.settings.staleness_aware:
            share /= max(1, self.version - seen.version)

        def squares(own: torch.Tensor) -> torch.Tensor:
            return torch.full_like(own, head["squares"])

        divisor = Divisor(head["n"], head["committed"])
        self.update.step(self.pieces, self._slices(gradient), divisor, squares, share)

    def _curvature(self, gradient: torch.Tensor, tokens: int) -> torch.Tensor:
        """What stands for the Hessian of a sum over so many tokens: λ G*G."""
        return gradient * gradient * self.settings.compensation

    def _slices(self, vector: torch.Tensor) -> list[torch.Tensor]:
        """A vector over this server's spans, by pieces."""
        return list(torch.split(vector, [len(piece) for piece in self.pieces]))

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
