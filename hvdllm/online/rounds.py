"""Which windows of the log each round trains on. Rank 0 decides it, once, and writes it down for all ranks.

    window   `context` + 1 consecutive tokens of the log, from a multiple of `context` on
    slice    the log in pieces of `slice` windows. The last `held` of each are held out, and never trained on
    fresh    the windows that may be trained on, numbered in the order of the log
    round    `count` fresh windows, every `stride`-th from `first` on, and `past` windows of before, which are drawn
             from those before `first`. The next round goes on at `next`; what lies between is left out

A round is written down before anybody trains on it. A resumed run therefore reads the same rounds again, whatever has
arrived meanwhile, and any number of ranks trains on the same windows.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
import zlib
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np

from hvdllm import untrusted
from hvdllm.errors import UserError
from hvdllm.order.epochs import drawn

NAME = "rounds.bin"
LOSSES = "losses.jsonl"
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

    def place(self, round: Round | None) -> int:
        """The number of the window behind the last one that was handed out up to this round; 0 if there is none.

        All windows before it have arrived. The next fresh one may lie behind held-out ones that have not.
        """
        return 0 if round is None else int(self.window(np.array([round.next - 1]))[0]) + 1

    def slices(self, tokens: int) -> int:
        """How many slices are whole once the log has so many tokens."""
        return (max(0, tokens - 1) // self.context) // self.slice

    def held_out(self, slice: int) -> np.ndarray:
        """The windows of a slice that are held out."""
        end = (slice + 1) * self.slice
        return np.arange(end - self.held, end)


def windows_of(
    round: Round, number: int, layout: Layout, seed: int, losses: dict[int, float] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The windows of a round, int64 [items], and whether each is fresh. Fresh ones come first.

    losses: of slices, by which windows of the past are weighted (Losses); None: all alike.
    """
    fresh = round.first + round.stride * np.arange(round.count, dtype=np.int64)
    random = drawn(seed, PAST, number)
    if losses:
        past = _weighted(random.random_sample(round.past), round.first, layout, losses)
    else:
        past = random.randint(0, max(1, round.first), round.past, dtype=np.int64)
    rows = layout.window(np.concatenate([fresh, past]))
    return rows, np.arange(round.items) < round.count


def _weighted(random: np.ndarray, count: int, layout: Layout, losses: dict[int, float]) -> np.ndarray:
    """Numbers below `count` of fresh windows, drawn by weight, from random numbers in [0, 1).

    A window has the loss of its slice as its weight. Where that was not measured, it is the loss of the newest slice
    before that was, or of the first one that was.
    """
    slices = sorted(losses)
    begins = np.minimum([0, *(k * (layout.slice - layout.held) for k in slices[1:])], count)
    ends = np.append(begins[1:], count)
    weights = np.array([losses[k] for k in slices])
    sums = np.cumsum(weights * (ends - begins))
    parts = np.minimum(np.searchsorted(sums, random * sums[-1], side="right"), len(slices) - 1)
    within = (random * sums[-1] - (sums - weights * (ends - begins))[parts]) / weights[parts]
    last = np.maximum(begins, ends - 1)
    found: np.ndarray = np.clip(begins[parts] + within.astype(np.int64), begins[parts], last[parts])
    return found


class Losses:
    """The held-out losses of slices by which the past is weighted, in a file. Rank 0 writes, all ranks read.

    A line says from which round on its losses count. It is written before that round is decided, so every rank that
    reads the round finds the line, and so does a run that is resumed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOSSES
        self._offset = 0
        self._lines: list[tuple[int, int, dict[int, float]]] = []  # evaluated at, counts from, losses
        self._lock = threading.Lock()  # rounds are loaded in a thread of their own

    def of(self, number: int) -> dict[int, float] | None:
        """The losses that count for a round; None before the first evaluation. Raises UserError for a damaged file."""
        with self._lock:
            self._refresh()
            return next((losses for _, since, losses in reversed(self._lines) if since <= number), None)

    def add(self, at: int, since: int, losses: dict[int, float]) -> None:
        """On rank 0: the losses of an evaluation before round `at` count from round `since` on, which is yet to decide.

        If an earlier life of the run has evaluated there, what it wrote stays. Raises OSError if the disk refuses.
        """
        with self._lock:
            self._refresh()
            if not losses or (self._lines and self._lines[-1][0] >= at):
                return
            line = json.dumps([at, since, {str(k): loss for k, loss in losses.items()}])
            if self._offset:
                os.truncate(self.path, self._offset)  # what a kill has cut short
            with untrusted.appended(self.path) as file:
                if not self._offset:
                    file.truncate(0)
                file.write(line + "\n")

    def _refresh(self) -> None:
        try:
            if self.path.stat().st_size == self._offset:
                return
            with untrusted.opened(self.path) as file:
                file.seek(self._offset)
                for line in untrusted.lines(file):
                    if not line.endswith(b"\n"):
                        break
                    at, since, found = json.loads(line)
                    losses = {int(k): float(loss) for k, loss in found.items()}
                    if type(at) is not int or type(since) is not int or not losses:
                        raise ValueError("a line says nothing")
                    if not all(0 < loss < math.inf and k >= 0 for k, loss in losses.items()):
                        raise ValueError("its losses are none")
                    self._lines.append((at, since, losses))
                    self._offset += len(line)
        except FileNotFoundError:
            return
        except (OSError, ValueError, TypeError, AttributeError, untrusted.Unfit) as error:
            raise UserError(f"{self.path} cannot be read ({error}): copy the log again") from None


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
