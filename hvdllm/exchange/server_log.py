"""The log of a parameter server: who may push, who may begin, and where all ranks stop. Arithmetic on plain values,
without letters, threads or tensors.

clock     pushes that a worker has made
ticket    the number of a push; servers apply pushes in the order of their tickets
version   how many pushes a piece has had
mark      a number of tokens at which every rank makes a commit. A light one is told with the next answer that each rank
          gets, and nobody waits. At a frozen one the log grants nothing from then on: the pieces stand where its pushes
          have brought them, every rank that has been told stands in its acts, and grants go on when all have left

A worker may begin clock c + 1 if its clock is at most `staleness` ahead of the slowest (stale synchronous parallel, Ho
et al., 2013); whoever waits is looked at again after every word that the log hears. So completed clocks are never more
than staleness + 1 apart. Staleness 0: tokens count, and a mark can be, only where all clocks are equal.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field
from typing import Any

from hvdllm.exchange.base import Milestones
from hvdllm.exchange.meta import SLOT


@dataclass
class Counts:
    """Where a run stands. tokens: committed; steps: of the servers' optimizer; mark: number of the last one; dropped:
    tokens of gradients that had no ticket when the world changed its size; trunk: steps that the optimizer brought."""

    tokens: int = 0
    pushes: int = 0
    steps: int = 0
    mark: int = 0
    dropped: int = 0
    trunk: int = 0
    clocks: list[int] = field(default_factory=list)


class Log:
    """workers: the first ranks; the others only serve. counts: where the run stands, its clocks one a worker."""

    def __init__(self, workers: int, ranks: int, staleness: int | None, milestones: Milestones, counts: Counts) -> None:
        self.workers, self.ranks, self.staleness, self.milestones = workers, ranks, staleness, milestones
        self.counts = counts
        self.waiting: dict[int, dict[str, Any]] = {}  # rank: what it has asked for, in the order of arrival
        self.frozen = False
        self._untold: list[deque[dict[str, Any]]] = [deque() for _ in range(ranks)]  # marks, for each rank
        self._left: set[int] = set()
        self._heard: list[float | None] = [None] * ranks  # when each rank last said something, or was answered
        self._now = 0.0
        self._marked = counts.tokens  # at the last mark
        self._whole = counts.pushes  # when all clocks were last equal
        self._held = 0  # tokens of pushes since, where they count together
        self._own = [0] * workers  # last ticket of each
        self._stop = self._save = False
        self._bad: float | None = None
        self._begin_window()

    def _begin_window(self) -> None:
        """Sums since the last mark, by rank where that makes them the same in every order."""
        self._loss = [0.0] * self.ranks
        self._loss_tokens, self._squares, self._norms = 0, 0.0, 0
        self._stale, self._stalest, self._pushed = 0.0, 0.0, 0
        self._slots = {name: [0.0] * self.ranks for name in SLOT}

    # ------------------------------------------------------------------ what ranks say
    def hear(self, rank: int, said: dict[str, Any], now: float = 0.0) -> None:
        """kind: push, begin or serve, which are answered (serve: with a mark alone); bad: this gradient is not finite,
        answered with a mark; overflow: nor is a sum; ask; left: a frozen mark. now: seconds."""
        kind = said["kind"]
        self._heard[rank] = self._now = now
        self._stop |= said.get("stop", False)
        self._save |= said.get("save", False)
        for name in SLOT:
            self._slots[name][rank] += said.get(name, 0.0)
        if kind == "left":
            self._left.add(rank)
            if len(self._left) == self.ranks:
                self.frozen, self._left, self._heard = False, set(), [now] * self.ranks
        elif kind in ("bad", "overflow"):
            self._bad = said["norm"]
        if kind in ("push", "begin", "serve", "bad"):
            self.waiting[rank] = said

    def silent(self, now: float, lease_s: float) -> int | None:
        """A rank whose word is due and was not heard for so long. Who waits for us, or is in an act, owes none."""
        for rank, heard in enumerate(self._heard):
            if heard is None:
                self._heard[rank] = now
            elif rank not in self.waiting and not (self.frozen and not self._untold[rank]) and now - heard > lease_s:
                return rank
        return None

    # ------------------------------------------------------------------ what they are told
    def answers(self) -> list[tuple[int, dict[str, Any]]]:
        """All that can be answered now."""
        out = []
        while (answer := self._next()) is not None:
            out.append(answer)
        return out

    def _next(self) -> tuple[int, dict[str, Any]] | None:
        self._mark()  # first: what has become due is due before the next grant
        for rank, said in self.waiting.items():
            answer = self._answer(rank, said)
            if answer is not None:
                del self.waiting[rank]
                self._heard[rank] = self._now
                return rank, answer
        return None

    def _answer(self, rank: int, said: dict[str, Any]) -> dict[str, Any] | None:
        if self._untold[rank]:
            return {"mark": self._untold[rank].popleft()}
        if self.frozen:
            return None
        if said["kind"] == "push":
            return self._ticket(rank, said)
        if said["kind"] == "begin" and self.may_begin(rank):
            return {"need": self._need(rank)}
        return None

    def may_begin(self, rank: int) -> bool:
        clocks = self.counts.clocks
        return self.staleness is None or clocks[rank] - min(clocks) <= self.staleness

    def _need(self, rank: int) -> int:
        """The version that its weights must have at least: whole clocks; all that have a ticket; its own pushes."""
        if self.staleness == 0:
            return self._whole
        return self._own[rank] if self.staleness is None else self.counts.pushes

    def _ticket(self, rank: int, said: dict[str, Any]) -> dict[str, Any]:
        """n: tokens; loss: their sum; norm: the last known; seen: the mean and the least version of its weights."""
        counts, n = self.counts, said["n"]
        counts.clocks[rank] += 1
        counts.pushes += 1
        self._own[rank] = counts.pushes
        self._held += n
        self._loss[rank] += said["loss"]
        self._loss_tokens += n
        if said["norm"] is not None:
            self._squares, self._norms = self._squares + said["norm"] ** 2, self._norms + 1
        committed = counts.tokens + self._held
        if self.staleness != 0:
            mean, least = said["seen"]
            self._stale += counts.pushes - 1 - mean
            self._stalest = max(self._stalest, counts.pushes - 1 - least)
        self._pushed += 1
        if self.staleness != 0 or self._is_whole():
            counts.tokens, self._held, self._whole = committed, 0, counts.pushes
            counts.steps += 1
        return {"ticket": counts.pushes, "committed": committed}

    def _is_whole(self) -> bool:
        return len(set(self.counts.clocks)) == 1

    # ------------------------------------------------------------------ marks
    def _mark(self) -> None:
        bad = self._bad is not None
        if self.frozen or not (bad or self.staleness != 0 or self._is_whole()):
            return
        here, before, wanted = self.counts.tokens, self._marked, self.milestones

        def crossed(cadences: tuple[int, ...]) -> bool:
            return any(every and here // every != before // every for every in cadences)

        if here == before and not bad:  # a stop that was asked right after a mark waits for what comes next
            return
        acts = bad or self._stop or self._save or crossed(wanted.acts) or before < wanted.budget <= here
        if not acts and not crossed(wanted.logs):
            return
        self.counts.mark += 1
        mark = {
            **asdict(self.counts), "frozen": acts, "stop": self._stop, "save": self._save, "bad": self._bad,
            "report": self._report(),
            "staleness": [self._stale / max(self._pushed, 1), self._stalest],
        }  # fmt: skip
        for untold in self._untold:
            untold.append(mark)
        self.frozen, self._marked = acts, here
        self._stop = self._save = False
        self._bad = None
        self._begin_window()

    def _report(self) -> dict[str, Any]:
        norm = math.sqrt(self._squares / self._norms) if self._norms else 0.0  # root mean square of the pushes'
        return {
            "loss_sum": sum(self._loss), "loss_tokens": self._loss_tokens, "grad_norm": norm, "noise_scale": None,
            **self._slots,
        }  # fmt: skip
