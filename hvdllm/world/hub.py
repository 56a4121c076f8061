"""How logical ranks take turns (the baton), and the simulated clock. virtual.py states the rules of both."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from hvdllm import device
from hvdllm.errors import PeerError
from hvdllm.world.base import Letter
from hvdllm.world.ranks import add

POLL_S = 1e-5  # simulated seconds that a poll takes if the answer is no


@dataclass(frozen=True)
class Links:
    """The links of all ranks on a simulated clock.

    Attributes:
        bytes_per_s: rate of each rank's link, in each direction.
        latency_s: seconds from leaving to arriving.
    """

    bytes_per_s: float = math.inf
    latency_s: float = 0.0


def always() -> bool:
    """A condition that always holds."""
    return True


def at_once() -> float:
    """The earliest time."""
    return 0.0


# ------------------------------------------------------------------ the baton
class Lane:
    """A thread that takes part in passing the baton.

    Attributes:
        rank: that it belongs to.
        number: 0 for the rank's own thread, 1 for its driver, more for further threads.
        time: on its simulated clock.
        go: the baton; the thread waits for it.
        ready: whether the thread can go on.
        at: from when on it can, once it is ready.
        waits: what it waits for, in words.
    """

    def __init__(self, rank: int, number: int, time: float = 0.0) -> None:
        self.rank, self.number, self.time = rank, number, time
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = always
        self.at: Callable[[], float] = at_once
        self.waits: Callable[[], str] = lambda: "its start"

    def due(self) -> float:
        """The time at which it goes on."""
        return max(self.time, self.at()) if self.ready() else self.time

    def place(self) -> tuple[float, int, int]:
        """Its key in the order of lanes."""
        return self.due(), self.rank, self.number


class Hub:
    """What the logical ranks of one process share. Only the holder of the baton touches it, except for `fail`.

    Args:
        links: the links of the ranks, or None if there is no simulated clock.
        near: how many ranks are on one logical host, among which transfers take no time; 1: each has its own link.
    """

    def __init__(self, links: Links | None = None, near: int = 1) -> None:
        self.links, self.near = links, near
        self.tick = 1.0 if links is None else POLL_S
        self.clock = 0.0  # when the holder got the baton
        self.busy: dict[tuple[int, str], float] = {}  # until when the link of (rank, up or down) is busy
        self.lanes: list[Lane] = []
        self.holder: Lane | None = None
        self.open: dict[object, Box] = {}  # collectives that some rank has not joined yet
        self.letters: dict[tuple[int, str], list[tuple[float, int, Letter]]] = {}  # by rank and box, as they arrive
        self.posted = 0  # how many letters
        self.random: dict[int, torch.Tensor] = {}
        self.failure: BaseException | None = None
        self.over = threading.Event()  # set when no lane is left

    # ------------------------------------------------------------------ time
    def now(self) -> float:
        """Seconds on the simulated clock of the calling thread, or 0 if there is no such clock."""
        return self.holder.time if self.links is not None and self.holder is not None else 0.0

    def spend(self, seconds: float) -> None:
        """Lets the holder compute for so long. Lanes whose clocks are behind run meanwhile."""
        assert self.holder is not None
        self.holder.time += seconds
        self._yield(always, lambda: "nothing")
        self._check()

    def carry(self, senders: Sequence[int], receivers: Sequence[int], sent: float) -> float:
        """Occupies the links of some ranks with a transfer that begins now, or as soon as the links are free.

        Args:
            senders: the sending ranks, numbered in the whole world.
            receivers: the receiving ranks; for a collective they are the senders.
            sent: bytes on each link.

        Returns the time at which all has arrived.
        """
        if self.links is None:
            return 0.0
        if len({rank // self.near for rank in (*senders, *receivers)}) == 1:
            return self.now()
        ways = [*((rank, "up") for rank in senders), *((rank, "down") for rank in receivers)]
        begin = max(self.now(), *(self.busy.get(way, 0.0) for way in ways))
        end = begin + sent / self.links.bytes_per_s
        self.busy.update(dict.fromkeys(ways, end))
        return end + self.links.latency_s

    # ------------------------------------------------------------------ passing the baton
    def wait(self, ready: Callable[[], bool], waits: Callable[[], str], at: Callable[[], float] = at_once) -> None:
        """Waits while other lanes run.

        Args:
            ready: the condition to wait for.
            waits: what this lane waits for, in words.
            at: the time to wait for, once the condition holds.

        Raises PeerError once a rank has failed.
        """
        if not self._there(ready, at):
            self._yield(ready, waits, at)
        self._check()

    def poll(self, ready: Callable[[], bool], at: Callable[[], float] = at_once) -> bool:
        """Whether `ready` holds and the time `at` has come. If not, other lanes have had a chance to run."""
        if not self._there(ready, at) and self.holder is not None:
            self.holder.time += self.tick
            self._yield(always, lambda: "nothing")
        self._check()
        return self._there(ready, at)

    def tell_time(self) -> None:
        """Makes the simulated clock, if there is one, the time that device.now tells the calling thread."""
        if self.links is not None:
            device.tell_time_by(self.now)

    def enter(self, lane: Lane) -> None:
        """Waits for the baton. Each lane begins with this."""
        lane.go.acquire()
        self._check()

    def leave(self, lane: Lane) -> None:
        """Takes the lane out and passes the baton on. Each lane ends with this."""
        self.lanes.remove(lane)
        if self.lanes:
            self.pass_on()
        else:
            self.holder = None
            self.over.set()

    def fail(self, error: BaseException) -> None:
        """Notes a failure. The first one counts, because later ones follow from it."""
        self.failure = self.failure or error

    def pass_on(self) -> None:
        """Gives the baton to the first lane that can go on. After a failure every lane can."""
        able = [lane for lane in self.lanes if self.failure is not None or lane.ready()]
        if not able:
            self.fail(RuntimeError(f"all ranks wait for each other: {'; '.join(map(_words, self.lanes))}"))
            able = self.lanes
        chosen = min(able, key=Lane.place)
        if self.links is not None:
            # The chosen lane goes on no earlier than what made it possible.
            chosen.time = self.clock = max(self.clock, chosen.due())
        if self.holder is not None and self.holder.rank != chosen.rank:
            self.random[self.holder.rank] = torch.get_rng_state()
            torch.set_rng_state(self.random[chosen.rank])
        self.holder = chosen
        chosen.go.release()

    def _there(self, ready: Callable[[], bool], at: Callable[[], float]) -> bool:
        return ready() and (self.holder is None or at() <= self.holder.time)

    def _yield(self, ready: Callable[[], bool], waits: Callable[[], str], at: Callable[[], float] = at_once) -> None:
        lane = self.holder
        assert lane is not None, "a virtual world is used by the threads of `run` only"
        lane.ready, lane.waits, lane.at = ready, waits, at
        self.pass_on()
        lane.go.acquire()

    def _check(self) -> None:
        if self.failure is not None:
            raise PeerError("another rank failed")


def _words(lane: Lane) -> str:
    lanes = {0: "", 1: " (driver)"}
    return f"rank {lane.rank}{lanes.get(lane.number, ' (a thread)')} waits for {lane.waits()}"


# ------------------------------------------------------------------ things travelling
class Box:
    """A collective of logical ranks.

    Attributes:
        what: the kind, dtype, shape and root, which must be the same on all ranks.
        size: how many ranks join.
        sent: bytes that a rank sends, the most of any.
        at: when it has arrived, known once all ranks have joined.
        parts: what each rank sends, copied.
        result: the sum, computed once.
    """

    def __init__(self, what: tuple[object, ...], size: int) -> None:
        self.what, self.size = what, size
        self.sent = self.at = 0.0
        self.parts: dict[int, torch.Tensor] = {}
        self.result: torch.Tensor | None = None

    def full(self) -> bool:
        """Whether all ranks have joined."""
        return len(self.parts) == self.size

    def ordered(self) -> list[torch.Tensor]:
        """The parts in rank order."""
        return [self.parts[rank] for rank in range(self.size)]

    def total(self) -> torch.Tensor:
        """The sum of the parts in rank order."""
        if self.result is None:
            self.result = add(self.ordered(), torch.empty_like(self.parts[0]))
        return self.result
