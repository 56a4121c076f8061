"""Which items each walker has taken where no round deals them: lanes through the order of the epochs.

There are as many lanes as there were walkers when the run began. Lane k of n takes every n-th item, the k-th first.
Where more walkers go on, new lanes are made: what the old ones have not read, up to the furthest place that one of them
has reached, comes first, so that no item is skipped and none is read twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from hvdllm.plain import Json


class Lanes:
    """taken: of each lane, how many of its items were handed out. walked: the lanes of this rank."""

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}
        self.walked: list[int] = []
        self._rest: list[int] = []  # positions that come before the lanes, dealt to them in turn
        self._from = 0  # each lane goes on from this place of its own once its part of the rest is done

    def of_walker(self, index: int, of: int) -> list[int]:
        """The lanes that walker `index` among `of` takes; makes new ones where there are more walkers than lanes."""
        if len(self.taken) < of:
            self._add(of)
        self.walked = [lane for lane in self.taken if lane % of == index]
        return self.walked

    def positions(self, lane: int, at: int, count: int) -> np.ndarray:
        """In the order of the epochs, of `count` items of a lane from its place `at` on."""
        return np.array([self._place(lane, k) for k in range(at, at + count)], dtype=np.int64)

    def state(self) -> Json:
        """How many lanes there are, where they began, and how far this rank has walked its own; {} without lanes."""
        if not self.taken:
            return {}
        begun = {"rest": self._rest, "from": self._from} if self._from or self._rest else {}
        return {"of": len(self.taken), "at": {str(k): self.taken[k] for k in self.walked}, **begun}

    def load(self, lanes: Sequence[Json]) -> None:
        """From the states of all ranks, however many there were."""
        known = {int(lane): at for each in lanes if each for lane, at in each["at"].items()}
        self.taken = dict(sorted(known.items()))
        begun = next((each for each in lanes if "from" in each), {})
        self._rest, self._from = list(begun.get("rest", [])), int(begun.get("from", 0))

    def _add(self, of: int) -> None:
        old, top = self.taken, 0
        if old:
            top = 1 + max((self._place(lane, at - 1) for lane, at in old.items() if at), default=-1)
        rest = [place for lane, at in old.items() for place in self._left(lane, at, top)]
        self._rest, self._from = sorted(rest), -(-top // of)
        self._rest += range(top, of * self._from)
        self.taken = dict.fromkeys(range(of), 0)

    def _left(self, lane: int, at: int, top: int) -> Iterator[int]:
        """The positions of a lane from its place `at` on, as long as they are below `top`."""
        while (place := self._place(lane, at)) < top:
            yield place
            at += 1

    def _place(self, lane: int, at: int) -> int:
        """The position of item `at` of a lane."""
        of = len(self.taken)
        first = len(range(lane, len(self._rest), of))  # of the rest
        return self._rest[lane + of * at] if at < first else lane + of * (self._from + at - first)
