"""Where this rank is: the phase, the step, and what it waits for. The heartbeat tells the other ranks of it.

The code that trains marks where it is by `enter`, and what it waits for by `waiting`. Both are a few assignments on the
host, and nothing where no run has begun, or where logical ranks share this process. Nothing here imports torch.

A phase may last as long as `Place.limit_s` says before it counts as standing still:

    ordinary   the run's hang_after, or FACTOR times the longest that this phase has lasted here, if that is more
    first      FIRST times as long, before the first update and at the first evaluation: code is compiled there, and
               memory and connections are made
    long       what nobody can foresee (preparing data, saving, sampling, waiting for text): nearly world.timeout_s
"""

from __future__ import annotations

import mmap
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from hvdllm.faults import Fault, commit

FACTOR = 5.0
FIRST = 10.0
LONG = frozenset({"start", "preparing data", "save", "sample", "waiting for text", "publish"})
ACTS = frozenset({"acts", "evaluation", "audit", "save", "sample", "publish", "shutdown"})  # which follow a step
SOON = frozenset({"shutdown"})  # runs no code that would be compiled
NEARLY = 0.9  # of world.timeout_s: the rank that stands still is named before those that wait give up
PAGE = struct.Struct("q64s64s")  # of the memory in which ranks of one host see where this one is
DRIVEN = "work of its driver thread"
SELF, ALL, ANOTHER = "self", "all", "another"  # who has failed, see `ends`


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    Attributes:
        phase: its name.
        step: how many updates were made.
        moves: grows with everything that this rank gets done.
        waits: the operation in which it waits for others, or None if it waits for nobody.
        limit_s: seconds that it may stand here.
    """

    phase: str = "start"
    step: int = 0
    moves: int = 0
    waits: str | None = None
    limit_s: float = 0.0


class Pulse:
    """The place of this rank, as its loop's thread marks it.

    Args:
        hang_after: seconds that an ordinary phase may stand still.
        timeout_s: seconds that ranks wait for each other at most.
        fault: what breaks this rank on purpose, or None.

    Attributes:
        page: memory of PAGE.size bytes that holds step, phase and wait at any time, also after this process is gone.
    """

    def __init__(self, hang_after: float, timeout_s: float, fault: Fault | None = None) -> None:
        self.hang_after, self.timeout_s, self.fault = hang_after, timeout_s, fault
        self.phase, self.step, self.moves = "start", 0, 0
        self.driver = 0  # the driver's thread
        self._driven = "exchange"  # the phase of what it does
        self._beside: dict[int, tuple[str, float]] = {}  # what threads beside the loop do, and since when
        self.page: mmap.mmap | None = None
        self._loop = threading.get_ident()
        self._waits: dict[int, str] = {}  # by thread
        self._since = time.monotonic()
        self._longest: dict[str, float] = {}

    def enter(self, phase: str) -> None:
        """The loop's thread, or one that works for it, begins something."""
        if threading.get_ident() == self._loop:
            now = time.monotonic()
            self._longest[self.phase] = max(now - self._since, self._longest.get(self.phase, 0.0))
            self.phase, self._since = phase, now
            self._waits.pop(self._loop, None)
        else:
            self._enter_beside(threading.get_ident(), phase)
        self._note()
        self.moves += 1
        if self.fault is not None and self.fault.due(phase, self.step):
            fault, self.fault = self.fault, None
            commit(fault)

    def _enter_beside(self, thread: int, phase: str) -> None:
        """A thread beside the loop, such as that of a server, begins an update, or has ended it."""
        if thread == self.driver:
            self._driven = phase
        before, since = self._beside.pop(thread, (phase, time.monotonic()))
        self._longest[before] = max(time.monotonic() - since, self._longest.get(before, 0.0))
        if phase == "update":
            self._beside[thread] = phase, time.monotonic()

    def wait(self, what: str | None) -> str | None:
        """The calling thread waits for others from here on, or no longer. Returns what it waited for before."""
        me, self.moves = threading.get_ident(), self.moves + 1
        before = self._waits.pop(me, None)
        if what is not None:
            self._waits[me] = what
        elif me == self._loop:
            self._since = time.monotonic()  # what was waited is not a time that this rank has needed
        self._note()
        return before

    def _note(self) -> None:
        if self.page is not None:
            phase, waits = self._here()
            PAGE.pack_into(self.page, 0, self.step, phase.encode(), (waits or "").encode())

    def _here(self) -> tuple[str, str | None]:
        """The phase, and what is waited for. A rank whose loop waits while another thread of it makes an update is
        there, and who waits for its driver's thread is where that is."""
        waits = self._waits.get(self._loop)
        if waits is not None:
            for thread, (phase, _) in list(self._beside.items()):
                if thread not in self._waits:
                    return phase, None
        return (self._driven, self._waits.get(self.driver)) if waits == DRIVEN else (self.phase, waits)

    def place(self) -> Place:
        """Where this rank is now. Any thread may ask."""
        phase, waits = self._here()
        return Place(phase, self.step, self.moves, waits, self._limit(self.phase))

    def _limit(self, phase: str) -> float:
        most = max(self.hang_after, NEARLY * self.timeout_s)
        if phase in LONG:
            return most
        first = phase not in SOON and (self.step == 0 or phase not in self._longest)
        return min(most, max(self.hang_after * (FIRST if first else 1.0), FACTOR * self._longest.get(phase, 0.0)))


_pulse: Pulse | None = None
_ends: Callable[[str, str], str] | None = None


def begin(pulse: Pulse | None) -> None:
    """From here on this pulse is that of the process; None: nothing is marked any more."""
    global _pulse
    _pulse = pulse


def enter(phase: str) -> None:
    """This rank begins a phase."""
    if _pulse is not None:
        _pulse.enter(phase)


def stepped(step: int) -> None:
    """So many updates were made."""
    if _pulse is not None:
        _pulse.step = step


def driver() -> None:
    """The calling thread is that of the driver."""
    if _pulse is not None:
        _pulse.driver = threading.get_ident()


@contextmanager
def during(phase: str) -> Iterator[None]:
    """A context that is a phase of its own; afterwards the phase before goes on."""
    before = _pulse.phase if _pulse is not None else ""
    enter(phase)
    yield
    enter(before)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A context in which this thread waits for other ranks, in the operation that is named."""
    pulse = _pulse
    if pulse is None:
        yield
        return
    before = pulse.wait(what)
    try:
        yield
    finally:
        pulse.wait(before)


def waits(what: str) -> None:
    """This thread waits for other ranks from here on, until it enters a phase."""
    if _pulse is not None:
        _pulse.wait(what)


# ------------------------------------------------------------------ the end of this process
def at_the_end(tell: Callable[[str, str], str] | None) -> None:
    """Sets who is told by `ends`."""
    global _ends
    _ends = tell


def ends(sentence: str, failed: str) -> str | None:
    """This process is about to end.

    Args:
        sentence: why.
        failed: which rank has failed: SELF, ALL together (and this one speaks for them), or ANOTHER one, which the
          heartbeat finds out.

    Returns None if there is no heartbeat. If there is one, it ends this process if another rank has failed; if this one
    has, it returns a line for the user with host, rank and step, or "".
    """
    return None if _ends is None else _ends(sentence, failed)
