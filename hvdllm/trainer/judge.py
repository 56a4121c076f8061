"""Says which rank stands still, by what the ranks tell of themselves.

Clocks of hosts are not compared. A rank counts its beats and what it gets done, and whoever judges notes by its own
clock when a count has last changed.

A rank stands still if its beats have stopped for `hang_after` seconds (it was stopped, or its host is down or out of
reach), or if it beats, waits for nobody, and has done nothing for as long as its phase may last. It is named only while
another rank waits for it, which then has done nothing for `hang_after` seconds either.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdllm.pulse import Place


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    Attributes:
        count: how many times it has told.
        place: where it is.
        left: whether it has ended in good order.
        words: why it ends, or "".
        stacks: how many times it has written its stacks.
    """

    count: int = 0
    place: Place = Place()
    left: bool = False
    words: str = ""
    stacks: int = 0


@dataclass
class Seen:
    """What was last heard of a rank, and the times at which its beats and its moves have last changed."""

    beat: Beat
    heard: float
    moved: float


@dataclass(frozen=True)
class Hang:
    """A rank that stands still.

    Attributes:
        rank: its number.
        seconds: how long.
        silent: whether it has stopped beating, too.
        waiting: what each of the ranks that wait is waiting for.
    """

    rank: int
    seconds: float
    silent: bool
    waiting: dict[int, str]


class Judge:
    """One rank's view of all ranks, itself included.

    Args:
        hang_after: seconds of silence after which a rank counts as standing still.
        rest: seconds between two looks.
        patience: the longest time between two looks. After a longer one this rank was itself stopped, or its disk was,
          and what it knows is too old to judge by.
    """

    def __init__(self, hang_after: float, rest: float, patience: float) -> None:
        self.hang_after, self.rest, self.patience = hang_after, rest, patience
        self.seen: dict[int, Seen] = {}
        self._told: tuple[int, int] | None = None  # the last hang that the user was told of: the rank, and its moves
        self._looked: float | None = None

    def due(self, now: float) -> bool:
        """Whether it is time for a look."""
        return self._looked is None or now - self._looked >= 0.9 * self.rest

    def told(self, rank: int) -> None:
        """The user was told that this rank stands still, and need not be told again until it has moved."""
        if rank in self.seen:
            self._told = rank, self.seen[rank].beat.place.moves

    def look(self, beats: dict[int, Beat], now: float) -> None:
        """Takes what the ranks tell now. A rank of which nothing can be read is left out."""
        late = self._looked is not None and now - self._looked > self.patience
        self._looked = now
        for rank, beat in beats.items():
            seen = self.seen.get(rank)
            if seen is None or late:
                self.seen[rank] = Seen(beat, now, now)
                continue
            if beat.count != seen.beat.count:
                seen.heard = now
            if beat.place.moves != seen.beat.place.moves:
                seen.moved = now
            seen.beat = beat

    def hang(self, now: float) -> Hang | None:
        """The rank that stands still and that others wait for, the longest first; None if there is none."""
        waiting, still = dict[int, str](), list[Hang]()
        for rank, seen in self.seen.items():
            place = seen.beat.place
            if seen.beat.left or self._told == (rank, place.moves):
                continue
            if now - seen.heard >= self.hang_after:
                still.append(Hang(rank, now - seen.heard, True, waiting))
            elif place.waits is None and now - seen.moved >= place.limit_s:
                still.append(Hang(rank, now - seen.moved, False, waiting))
            elif place.waits is not None and now - seen.moved >= self.hang_after:
                waiting[rank] = place.waits
        return max(still, key=lambda hang: (hang.silent, hang.seconds, -hang.rank)) if still and waiting else None
