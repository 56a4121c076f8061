"""Which windows of the log each round trains on. Rank 0 decides it, once, and writes it down for all ranks.

    window   `context` + 1 consecutive tokens of the log, from a multiple of `context` on
    slice    the log in pieces of `slice` windows. The last `held` of each are held out, and never trained on
    fresh    the windows that may be trained on, numbered in the order of the log
    round    `count` fresh windows, every `stride`-th from `first` on, and `past` windows of before, which are drawn
             uniformly from those before `first`. The next round goes on at `next`; what lies between is left out

A round is written down before anybody trains on it. A resumed run therefore reads the same rounds again, whatever has
arrived meanwhile, and any number of ranks trains on the same windows.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.order.epochs import drawn

NAME = "rounds.bin"
FORM = struct.Struct("<5qI")
MOST = 2**24  # windows in a round
PAST = 11  # key of seeds


@dataclass(frozen=True)
class Round:
    """Windows of one round; see above."""

    first: int
    count: int
    stride: int
    next: int
    past: int

    @property
    def sane(self) -> bool:
        """Whether rank 0 may have decided so. What a stranger's file says must not take all memory."""
        whole = self.first >= 0 and 1 <= self.count <= MOST and 0 <= self.past <= MOST and self.stride >= 1
        return whole and self.first + self.stride * (self.count - 1) < self.next < 2**48

    @property
    def items(self) -> int:
        """Windows of the round, those of the past included."""
        return self.count + self.past


@dataclass(frozen=True)
class Layout:
    """Where windows lie in the log.

    Attributes:
        context: tokens in a window, without its last target.
        slice: windows in a slice.
        held: windows at the end of each slice that are held out.
    """

    context: int
    slice: int
    held: int

    def fresh(self, tokens: int) -> int:
        """How many windows may be trained on once the log has so many tokens."""
        whole, rest = divmod(max(0, tokens - 1) // self.context, self.slice)
        return whole * (self.slice - self.held) + min(rest, self.slice - self.held)

    def window(self, fresh: np.ndarray) -> np.ndarray:
        """The numbers of windows from those among the fresh ones."""
        slices, places = np.divmod(fresh, self.slice - self.held)
        return slices * self.slice + places

    def slices(self, tokens: int) -> int:
        """How many slices are whole once the log has so many tokens."""
        return (max(0, tokens - 1) // self.context) // self.slice

    def held_out(self, slice: int) -> np.ndarray:
        """The windows of a slice that are held out."""
        end = (slice + 1) * self.slice
        return np.arange(end - self.held, end)


def windows_of(round: Round, number: int, layout: Layout, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a round, int64 [items], and whether each is fresh. Fresh ones come first."""
    fresh = round.first + round.stride * np.arange(round.count, dtype=np.int64)
    past = drawn(seed, PAST, number).randint(0, max(1, round.first), round.past, dtype=np.int64)
    rows = layout.window(np.concatenate([fresh, past]))
    return rows, np.arange(round.items) < round.count


class Rounds:
    """The rounds that were decided, in a file. Rank 0 writes, all ranks read."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._known: dict[int, Round] = {}

    def get(self, number: int) -> Round | None:
        """A round, or None if it is not decided yet. Raises UserError if the file is damaged."""
        if (found := self._known.get(number)) is not None:
            return found
        try:
            with untrusted.opened(self.path) as file:
                file.seek(number * FORM.size)
                data = file.read(64 * FORM.size)
        except FileNotFoundError:
            return None
        except (OSError, untrusted.Unfit) as error:
            raise UserError(f"{self.path} cannot be read ({error}): copy the log again") from None
        for at in range(0, len(data) - FORM.size + 1, FORM.size):
            *numbers, total = FORM.unpack_from(data, at)
            found = Round(*numbers)
            place = number + at // FORM.size
            if _sum(place, found) != total or not found.sane:
                if at + FORM.size < len(data):
                    raise UserError(f"{self.path}: round {place} is not what was written: copy the log again")
                break  # it is being written
            self._known[place] = found
        if len(self._known) > 4096:
            self._known = {k: v for k, v in self._known.items() if k >= number}
        return self._known.get(number)

    def count(self) -> int:
        """How many rounds were decided. What a kill has cut short does not count."""
        try:
            whole = self.path.stat().st_size // FORM.size
        except FileNotFoundError:
            return 0
        return whole if whole == 0 or self.get(whole - 1) is not None else whole - 1

    def add(self, number: int, round: Round) -> None:
        """Writes down the next round. Raises OSError if the disk refuses."""
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            data = FORM.pack(*astuple(round), _sum(number, round))
            os.pwrite(handle, data, number * FORM.size)
            os.ftruncate(handle, (number + 1) * FORM.size)
        finally:
            os.close(handle)
        self._known[number] = round

    def sync(self) -> None:
        """Waits until what was decided is on the disk."""
        handle = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sum(number: int, round: Round) -> int:
    values: Sequence[int] = (number, *astuple(round))
    return zlib.crc32(struct.pack("<6q", *values))


@dataclass(frozen=True)
class Plan:
    """How rank 0 decides.

    Attributes:
        batch: windows in a round, those of the past included.
        least: windows that a round must have at least, and of which it has a multiple of `parts`.
        replay: the share of `batch` that comes from the past.
        backlog: what happens to windows that wait while many more arrive: all, newest or sample.
        behind: windows that may wait before some are left out; only with newest and sample.
        parts: equal parts that a round is cut into.
        begin: the fresh window at which the first round begins.
    """

    batch: int
    least: int
    replay: float = 0.0
    backlog: str = "all"
    behind: int = 0
    parts: int = 1
    begin: int = 0

    @property
    def fresh(self) -> int:
        """Fresh windows in a whole round."""
        return max(1, self.batch - round(self.batch * self.replay))

    def whole(self, first: int, fresh: int) -> Round | None:
        """The next round, from window `first` on, if there is a whole batch among `fresh` windows; else None."""
        waiting = fresh - first
        if waiting < self.fresh:
            return None
        begin, stride, after = first, 1, first + self.fresh
        if waiting > max(self.behind, self.fresh) and self.backlog != "all":
            after = fresh
            if self.backlog == "newest":
                begin = fresh - self.fresh
            else:
                stride = waiting // self.fresh
        return Round(begin, self.fresh, stride, after, self.batch - self.fresh if begin > 0 else 0)

    def short(self, first: int, fresh: int) -> Round | None:
        """A round of what there is, if that is enough."""
        waiting = min(fresh - first, self.fresh)
        past = int(waiting * self.replay / (1 - self.replay)) if first > 0 and self.replay < 1 else 0
        waiting -= (waiting + past) % self.parts
        if waiting < 1 or waiting + past < self.least:
            return None
        return Round(first, waiting, 1, first + waiting, past)
