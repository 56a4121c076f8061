"""Decides rounds, on rank 0, from what has arrived; tells all ranks what was decided."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from hvdllm.errors import RunError, UserError
from hvdllm.online.log import Entry
from hvdllm.online.readers import Readers
from hvdllm.online.rounds import Layout, Losses, Plan, Round, Rounds, windows_of
from hvdllm.online.windows import OF_SLICE, LogItems


class Decider:
    """The rounds of a stream, as one rank sees them.

    Args:
        items: the windows of the log.
        rounds: that were decided.
        layout: where windows lie.
        plan: how rank 0 decides.
        rank: this rank.
        wait_s: seconds for which a whole batch is waited for, before a round is made of what there is.
        still: nothing is appended to the log.
        losses: by which the past is weighted; None if all of it is alike.

    Attributes:
        readers: those that this rank has started, or None.
    """

    def __init__(
        self, items: LogItems, rounds: Rounds, layout: Layout, plan: Plan, *, rank: int, wait_s: float,
        still: bool = False, losses: Losses | None = None,
    ) -> None:  # fmt: skip
        self.items, self.rounds, self.layout, self.plan = items, rounds, layout, plan
        self.rank, self.wait_s, self.still, self.losses = rank, wait_s, still, losses
        self.readers: Readers | None = None
        self._unforgotten: deque[Entry] = deque()  # entries of the log that the source has not been told to forget

    def read_by(self, readers: Readers | None) -> None:
        """Takes the readers that this rank has started."""
        self.readers = readers
        if readers is not None:
            self.items.log.news = self._unforgotten

    def decided(self, number: int) -> Round | None:
        """A round, if it is decided. Rank 0 decides it as soon as a whole batch is there."""
        found = self.rounds.get(number)
        if found is None and self.rank == 0:
            found = self._decide(number, self.plan.whole)
        elif found is None and self.readers is not None:
            self.readers.look()
        return found

    def ready(self, number: int, waited_s: float) -> bool:
        """Whether a round is decided. Rank 0 makes it of what there is once the loop has waited so long, or if nothing
        more comes."""
        if self.decided(number) is not None:
            return True
        if self.rank or not (self._ends() or waited_s >= self.wait_s):
            return False
        return self._decide(number, self.plan.short) is not None

    def over(self) -> bool:
        """Whether nothing more will arrive, as rank 0 knows. What is left then is too little for a round."""
        return self.rank == 0 and self._ends()

    def windows(self, number: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The windows of a round that was decided, int64 [items], and whether each is fresh."""
        round = self.rounds.get(number)
        if round is None:
            raise UserError(f"{self.rounds.path} has no round {number}: copy the log again")
        losses = self.losses.of(number) if self.losses is not None and round.past else None
        return windows_of(round, number, self.layout, seed, losses)

    def place(self, number: int) -> int:
        """The window behind the last fresh one that was handed out once the rounds before this one were."""
        return self.layout.place(self.rounds.get(number - 1) if number else None)

    # ------------------------------------------------------------------ at a mark
    def saved(self, number: int) -> None:
        """A checkpoint is whole that goes on with this round, so the source may forget what was trained on."""
        if self.readers is None or number == 0 or self.rounds.get(number - 1) is None:
            return
        self.items.log.refresh()
        trained = self.place(number) * self.items.context
        last: dict[int, Entry] = {}  # by reader
        while self._unforgotten and self._unforgotten[0].tokens <= trained:
            entry = self._unforgotten.popleft()
            last[entry.reader] = entry
        for entry in last.values():
            self.readers.forget(entry)

    def evaluated(self, number: int, since: int, metrics: dict[str, float]) -> None:
        """Takes the losses of slices, by which rounds from `since` on draw from the past; `number` is the next one.

        Raises RunError if a disk refuses.
        """
        if self.losses is None or self.rank:
            return
        losses = {int(key.removeprefix(OF_SLICE)): x for key, x in metrics.items() if key.startswith(OF_SLICE)}
        try:
            self.losses.add(number, max(since, self.rounds.count()), losses)
        except OSError as error:
            raise RunError(f"{self.losses.path} cannot be written ({error.strerror}): make room") from None

    def standing(self, number: int) -> dict[str, float]:
        """On rank 0: documents that have arrived, and tokens of them that wait to be trained on from this round on."""
        if self.rank:
            return {}
        before = self.rounds.get(number - 1) if number else None
        last, first = self.items.log.last, before.next if before is not None else 0
        waiting = (self.layout.fresh(last.tokens) - first) * self.items.context
        return {"arrived": last.documents, "waiting_tokens": waiting}

    # ------------------------------------------------------------------ inside
    def _decide(self, number: int, rule: Callable[[int, int], Round | None]) -> Round | None:
        before = self.rounds.get(number - 1) if number else None
        if number and before is None:
            raise RunError(f"{self.rounds.path} has no round {number - 1}: the log was cut, copy it again")
        self._look()
        found = rule(before.next if before else self.plan.begin, self.layout.fresh(self.items.log.last.tokens))
        if found is not None:
            try:
                self.rounds.add(number, found)
            except OSError as error:
                raise RunError(f"{self.rounds.path} cannot be written ({error.strerror}): make room") from None
        return found

    def _look(self) -> None:
        """Looks at what has arrived. Raises RunError if nothing can arrive any more."""
        if self.readers is not None:
            self.readers.look()
        self.items.log.refresh()

    def _ends(self) -> bool:
        return self.still or bool(self.items.log.last.at.get("over"))
