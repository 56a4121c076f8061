"""The log of a parameter server: who may push, who may begin, and where all ranks stop. It is arithmetic on plain
values, without letters, threads or tensors.

clock     the number of pushes that a worker has made
ticket    the number of a push; servers apply pushes in the order of their tickets
version   how many pushes a piece has had
mark      a number of tokens at which every rank makes a commit. A light mark is told with the next answer that each
          rank gets, and nobody waits for it. From a frozen mark on the log grants nothing: the pieces stand where the
          pushes before it have brought them, and every rank that has been told stands in its acts. Grants go on when
          all ranks have left

A worker may begin clock c + 1 if its clock is at most `staleness` ahead of the slowest one (stale synchronous parallel,
Ho et al., 2013). Workers that wait are looked at again after every word that the log hears. The numbers of completed
clocks therefore never differ by more than staleness + 1. At staleness 0 tokens count, and a mark can be, only where all
clocks are equal.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import asdict, dataclass, field

from hvdllm.exchange.base import Milestones, Values
from hvdllm.exchange.meta import SLOT
from hvdllm.world.base import Asks


@dataclass
class Standing:
    """Where a run stands.

    tokens: committed; pushes: that have a ticket
    steps: of the servers' optimizer; trunk: those of them that it had made before this run
    mark: number of the last mark
    dropped: tokens of gradients that had no ticket when the world changed its size
    clocks: one a worker
    """

    tokens: int = 0
    pushes: int = 0
    steps: int = 0
    mark: int = 0
    dropped: int = 0
    trunk: int = 0
    clocks: list[int] = field(default_factory=list)


class SinceMark:
    """What pushes have told since the last mark, by rank where that makes the sums the same in every order."""

    def __init__(self, ranks: int) -> None:
        self.loss = [0.0] * ranks
        self.loss_tokens = self.pushes = 0
        self.squares, self.norms = 0.0, 0  # of the norms that were told, and how many
        self.stale = self.stalest = 0.0
        self.slots = {name: [0.0] * ranks for name in SLOT}

    def push(self, rank: int, said: Values) -> None:
        self.loss[rank] += said["loss"]
        self.loss_tokens += said["n"]
        self.pushes += 1
        if said["norm"] is not None:
            self.squares, self.norms = self.squares + said["norm"] ** 2, self.norms + 1

    def report(self) -> Values:
        norm = math.sqrt(self.squares / self.norms) if self.norms else 0.0  # root mean square of the pushes' norms
        return {
            "loss_sum": sum(self.loss), "loss_tokens": self.loss_tokens, "grad_norm": norm, "noise_scale": None,
            **self.slots,
        }  # fmt: skip


class Lease:
    """Who has been silent for too long. due: for each rank, since when its word is due; None before its first one.
    idle: workers that have nothing to train on."""

    def __init__(self, ranks: int) -> None:
        self.due: list[float | None] = [None] * ranks
        self.idle: set[int] = set()
        self.now = 0.0

    def hear(self, rank: int, now: float) -> None:
        self.due[rank] = self.now = now

    def answered(self, rank: int) -> None:
        self.due[rank] = self.now

    def all_left(self) -> None:
        """An act is over: the word of every rank is due from now on."""
        self.due = [self.now] * len(self.due)


class UpdateLog:
    """workers: the first ranks; the others only serve. standing: where the run stands.

    waiting: what each rank has asked for, in the order of arrival
    frozen: the last mark holds all ranks; left: those that have left it
    """

    def __init__(
        self, workers: int, ranks: int, staleness: int | None, milestones: Milestones, standing: Standing
    ) -> None:
        self.staleness, self.milestones, self.standing = staleness, milestones, standing
        self.waiting: dict[int, Values] = {}
        self.frozen = False
        self._left: set[int] = set()
        self._untold: list[deque[Values]] = [deque() for _ in range(ranks)]  # marks, for each rank
        self._lease = Lease(ranks)
        self._marked = standing.tokens  # at the last mark
        self._whole = standing.pushes  # when all clocks were last equal
        self._held = 0  # tokens of pushes since then, where they count together
        self._own = [0] * workers  # last ticket of each
        self._asks = Asks()
        self._bad: float | None = None
        self._since = SinceMark(ranks)

    # ------------------------------------------------------------------ what ranks tell
    def hear(self, rank: int, said: Values, now: float = 0.0) -> None:
        """said: what a rank has posted, now: seconds. Its kind is one of

        push, begin   are answered, with what is granted or with a mark
        serve         is answered with a mark
        idle          a worker has nothing to train on; is answered at once, with a mark if there is one
        bad           this rank's gradient is not finite; is answered with a mark
        overflow      a sum on a server is not finite
        ask           carries what a person has asked
        left          the rank has left a frozen mark
        """
        kind = said["kind"]
        self._lease.hear(rank, now)
        self._asks.stop |= said.get("stop", False)
        self._asks.save |= said.get("save", False)
        for name in SLOT:
            self._since.slots[name][rank] += said.get(name, 0.0)
        if kind == "left":
            self._left.add(rank)
            if len(self._left) == len(self._untold):
                self.frozen, self._left = False, set()
                self._lease.all_left()
        elif kind in ("bad", "overflow"):
            self._bad = said["norm"]
        if kind in ("push", "begin", "serve", "bad", "idle"):
            self.waiting[rank] = said
            (self._lease.idle.add if kind == "idle" else self._lease.idle.discard)(rank)

    def silent(self, now: float, lease_s: float) -> int | None:
        """A rank whose word is due and was not heard for so long. A rank that waits for the log, or that is in an act,
        owes none."""
        for rank, since in enumerate(self._lease.due):
            if since is None:
                self._lease.due[rank] = now
            elif rank not in self.waiting and not (self.frozen and not self._untold[rank]) and now - since > lease_s:
                return rank
        return None

    # ------------------------------------------------------------------ what they are answered
    def answers(self) -> list[tuple[int, Values]]:
        """All that can be answered now."""
        out = []
        while (answer := self._next()) is not None:
            out.append(answer)
        return out

    def _next(self) -> tuple[int, Values] | None:
        self._mark()  # first: what has become due is due before the next grant
        for rank, said in self.waiting.items():
            answer = self._answer(rank, said)
            if answer is not None:
                del self.waiting[rank]
                self._lease.answered(rank)
                return rank, answer
        return None

    def _answer(self, rank: int, said: Values) -> Values | None:
        if self._untold[rank]:
            return {"mark": self._untold[rank].popleft()}
        if self.frozen:
            return None
        if said["kind"] == "idle":
            return {}
        if said["kind"] == "push":
            return self._ticket(rank, said)
        if said["kind"] == "begin" and self.may_begin(rank):
            return {"need": self._need(rank)}
        return None

    def may_begin(self, rank: int) -> bool:
        clocks = self.standing.clocks
        return self.staleness is None or clocks[rank] - min(clocks) <= self.staleness

    def _need(self, rank: int) -> int:
        """The least version that its weights must have. Staleness 0: whole clocks; bounded: all that have a ticket;
        asynchronous: its own pushes."""
        if self.staleness == 0:
            return self._whole
        return self._own[rank] if self.staleness is None else self.standing.pushes

    def _ticket(self, rank: int, said: Values) -> Values:
        """n: tokens; loss: their sum; norm: the last that is known; seen: mean and least version of its weights."""
        standing, n, since = self.standing, said["n"], self._since
        standing.clocks[rank] += 1
        standing.pushes += 1
        self._own[rank] = standing.pushes
        self._held += n
        since.push(rank, said)
        committed = standing.tokens + self._held
        if self.staleness != 0:
            mean, least = said["seen"]
            since.stale += standing.pushes - 1 - mean
            since.stalest = max(since.stalest, standing.pushes - 1 - least)
        if self.staleness != 0 or self._is_whole():
            standing.tokens, self._held, self._whole = committed, 0, standing.pushes
            standing.steps += 1
        return {"ticket": standing.pushes, "committed": committed}

    def _is_whole(self) -> bool:
        return len(set(self.standing.clocks)) == 1

    # ------------------------------------------------------------------ marks
    def _mark(self) -> None:
        bad = self._bad is not None
        if self.frozen or not (bad or self.staleness != 0 or self._is_whole()):
            return
        here, before, wanted = self.standing.tokens, self._marked, self.milestones

        def crossed(cadences: tuple[int, ...]) -> bool:
            return any(every and here // every != before // every for every in cadences)

        asks, since = self._asks, self._since
        nothing_comes = len(self._lease.idle) == len(self.standing.clocks) and (asks.stop or asks.save)
        if here == before and not bad and not nothing_comes:
            return  # a stop that was asked for right after a mark waits for what comes next
        acts = bad or asks.stop or asks.save or crossed(wanted.acts) or before < wanted.budget <= here
        if not acts and not crossed(wanted.logs):
            return
        self.standing.mark += 1
        mark = {
            **asdict(self.standing), "frozen": acts, "stop": asks.stop, "save": asks.save, "bad": self._bad,
            "report": since.report(), "staleness": [since.stale / max(since.pushes, 1), since.stalest],
        }  # fmt: skip
        for untold in self._untold:
            untold.append(mark)
        self.frozen, self._marked, self._bad = acts, here, None
        self._asks, self._since = Asks(), SinceMark(len(self._untold))
