"""How logical ranks take turns: the baton, and the simulated clock. virtual.py says what holds for both."""

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

POLL_S = 1e-5  # simulated, of a poll in vain


@dataclass(frozen=True)
class Links:
    """Of every rank, on a simulated clock: bytes a second each way, and seconds from leaving to arriving."""

    bytes_per_s: float = math.inf
    latency_s: float = 0.0


def always() -> bool:
    return True


def at_once() -> float:
    return 0.0


# ------------------------------------------------------------------ the baton
class Lane:
    """A thread that takes part in passing the baton. ready: whether it can go on; at: from when on, once ready; waits:
    for what, in words."""

    def __init__(self, rank: int, number: int, time: float = 0.0) -> None:
        self.rank, self.number, self.time = rank, number, time
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = always
        self.at: Callable[[], float] = at_once
        self.waits: Callable[[], str] = lambda: "its start"

    def due(self) -> float:
        """When it goes on."""
        return max(self.time, self.at()) if self.ready() else self.time

    def place(self) -> tuple[float, int, int]:
        return self.due(), self.rank, self.number


class Hub:
    """What the ranks of one process share. Only the holder of the baton touches it, but for `fail`.

    near: ranks of one logical host, whose talk takes no time; 1: each has a link of its own to all others.
    """

    def __init__(self, links: Links | None = None, near: int = 1) -> None:
        self.links, self.near = links, near
        self.tick = 1.0 if links is None else POLL_S
        self.clock = 0.0  # when the holder got the baton
        self.busy: dict[tuple[int, str], float] = {}  # (rank, up or down): until when
        self.lanes: list[Lane] = []
        self.holder: Lane | None = None
        self.open: dict[object, Box] = {}  # collectives that some rank has not joined yet
        self.letters: dict[tuple[int, str], list[tuple[float, int, Letter]]] = {}  # by rank and box, as they arrive
        self.posted = 0  # letters
        self.random: dict[int, torch.Tensor] = {}
        self.failure: BaseException | None = None
        self.over = threading.Event()  # no lane is left

    # ------------------------------------------------------------------ time
    def now(self) -> float:
        """Seconds of the simulated clock, for the thread that asks; 0 where there is none."""
        return self.holder.time if self.links is not None and self.holder is not None else 0.0

    def spend(self, seconds: float) -> None:
        """The holder computes for so long; who is behind goes on meanwhile."""
        assert self.holder is not None
        self.holder.time += seconds
        self._yield(always, lambda: "nothing")
        self._check()

    def carry(self, senders: Sequence[int], receivers: Sequence[int], sent: float) -> float:
        """When `sent` bytes a link, which leave now, will have arrived: of a collective (senders are the receivers) or
        a letter. Ranks of the whole. Books their links."""
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
        """Returns when `ready` and, from then on, the time is `at`; others run meanwhile. Raises PeerError once a rank
        has failed."""
        if not self._there(ready, at):
            self._yield(ready, waits, at)
        self._check()

    def poll(self, ready: Callable[[], bool], at: Callable[[], float] = at_once) -> bool:
        """Whether `ready` and the time is `at`; if not, others have had a chance to run."""
        if not self._there(ready, at) and self.holder is not None:
            self.holder.time += self.tick
            self._yield(always, lambda: "nothing")
        self._check()
        return self._there(ready, at)

    def tell_time(self) -> None:
        """The calling thread reads the simulated clock, where there is one, as the time."""
        if self.links is not None:
            device.tell_time_by(self.now)

    def enter(self, lane: Lane) -> None:
        """A lane's first act: waits for the baton."""
        lane.go.acquire()
        self._check()

    def leave(self, lane: Lane) -> None:
        """A lane's last act, baton in hand."""
        self.lanes.remove(lane)
        if self.lanes:
            self.pass_on()
        else:
            self.holder = None
            self.over.set()

    def fail(self, error: BaseException) -> None:
        """The first failure counts: what other ranks say afterwards follows from it."""
        self.failure = self.failure or error

    def pass_on(self) -> None:
        """The baton goes to the first lane that can go on; after a failure that is any."""
        able = [lane for lane in self.lanes if self.failure is not None or lane.ready()]
        if not able:
            self.fail(RuntimeError(f"all ranks wait for each other: {'; '.join(map(_words, self.lanes))}"))
            able = self.lanes
        chosen = min(able, key=Lane.place)
        if self.links is not None:
            # What the holder has just made possible happens no earlier than that.
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
    """A collective. parts: what each rank sends, copied; result: of the sum, made once. sent: bytes, the most of any
    rank; at: when it arrives, once all have joined."""

    def __init__(self, what: tuple[object, ...], size: int) -> None:
        self.what, self.size = what, size
        self.sent = self.at = 0.0
        self.parts: dict[int, torch.Tensor] = {}
        self.result: torch.Tensor | None = None

    def full(self) -> bool:
        return len(self.parts) == self.size

    def ordered(self) -> list[torch.Tensor]:
        return [self.parts[rank] for rank in range(self.size)]

    def total(self) -> torch.Tensor:
        if self.result is None:
            self.result = add(self.ordered(), torch.empty_like(self.parts[0]))
        return self.result
