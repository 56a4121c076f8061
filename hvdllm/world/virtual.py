"""Many logical ranks as threads of one process, with exact and deterministic collectives and no launcher or network.

It is for oracles at many ranks and for convergence experiments with many workers. Simulated times tell how ranks of
given speeds would wait for each other; what a step costs can only be measured with real ranks.

Invariant: one thread runs at a time, the one that holds the baton. The baton changes hands only when a rank waits,
polls without success or lets time pass. It goes to the smallest (simulated time, rank, lane) that can go on, so two
equal runs are bit-equal on any machine. A rank has two lanes, its own thread and its driver. torch's random state on
the CPU is swapped with the baton, so each rank draws as if it were alone.

Without `links` only a poll without success takes time, so that a rank that polls lets others run. With them a clock is
simulated, and what happens is ordered by its times (causality):
    compute      takes as long as `spend` says
    a collective leaves when its last rank has joined and the links of its ranks are free; it takes the bytes that a
                 rank sends, divided by the link's rate, plus the latency; a link carries one transfer at a time
    waiting      lasts until what is waited for has arrived; a poll before that says no and costs POLL_S

It is strict where real ranks fail only sometimes. These are errors at once: a name that is launched again before its
last use was seen to land, tensors that do not match, a tensor that is written to in flight, and ranks that all wait for
each other.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from hvdllm import device
from hvdllm.errors import UserError
from hvdllm.world.base import Asks, Flight
from hvdllm.world.hub import Box, Hub, Lane, Links
from hvdllm.world.ranks import Ranks, Where, adasum, broadcast_sends, group_of, must_be_power_of_two
from hvdllm.world.virtual_mail import VirtualMail, spawn

T = TypeVar("T")


class VirtualFlight:
    """One collective, as one rank sees it.

    Args:
        hub: what the ranks share.
        box: the collective.
        x: the tensor of this rank.
        rank: this rank.
        name: of the collective.
        finish: makes what lands, once all ranks have joined.
    """

    def __init__(self, hub: Hub, box: Box, x: torch.Tensor, rank: int, name: str, finish: Callable[[], object]) -> None:
        self.hub, self.box, self.x, self.rank, self.name, self.finish = hub, box, x, rank, name, finish
        self.seen = False  # whether this rank has seen it land
        self.value: object = None

    def landed(self) -> bool:
        self.seen = self.seen or self.hub.poll(self.box.full, self._at)
        return self.seen

    def land(self) -> Any:
        if self.value is None:
            self.hub.wait(self.box.full, self._waits, self._at)
            if not _same_bits(self.x, self.box.parts[self.rank]):
                raise RuntimeError(f"rank {self.rank} wrote to the tensor of `{self.name}` while it was in flight")
            self.value, self.seen = self.finish(), True
        return self.value

    def _at(self) -> float:
        return self.box.at

    def _waits(self) -> str:
        missing = [str(rank) for rank in range(self.box.size) if rank not in self.box.parts]
        return f"`{self.name}` without rank{'s' * (len(missing) > 1)} {', '.join(missing)}"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, so that a NaN equals itself."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


class ClockedFlight:
    """A flight of several stages. An error of `work` is raised when it lands, as by the driver of real ranks."""

    def __init__(self, hub: Hub, work: Callable[[], object]) -> None:
        self.hub, self.work = hub, work
        self.done = False
        self.value: object = None
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self.value = self.work()
        except Exception as error:
            self.error = error
        self.done = True

    def landed(self) -> bool:
        return self.hub.poll(lambda: self.done)

    def land(self) -> Any:
        self.hub.wait(lambda: self.done, lambda: "driven work")
        if self.error is not None:
            raise self.error
        return self.value


class ClockedDriver:
    """The second lane of a rank, which runs flights of several stages. Its thread is made at the first call."""

    def __init__(self, hub: Hub, rank: int) -> None:
        self.hub, self.rank = hub, rank
        self.queue: deque[ClockedFlight] = deque()
        self.begun = self.closed = False
        self.thread = 0

    def __call__(self, work: Callable[[], object]) -> ClockedFlight:
        flight = ClockedFlight(self.hub, work)
        if threading.get_ident() == self.thread:  # a stage of what is being driven
            flight.run()
            return flight
        self.queue.append(flight)
        if not self.begun:
            self.begun = True
            lane = Lane(self.rank, 1, self.hub.now())
            self.hub.lanes.append(lane)
            device.start_thread(lambda: self._run(lane), f"driver-{self.rank}")
        return flight

    def close(self) -> None:
        """Ends the thread after the work that was driven before."""
        self.closed = True

    def _run(self, lane: Lane) -> None:
        self.thread = threading.get_ident()
        self.hub.tell_time()
        try:
            self.hub.enter(lane)
            while True:
                self.hub.wait(lambda: bool(self.queue) or self.closed, lambda: "work to drive")
                if not self.queue:
                    break
                self.queue.popleft().run()
        except BaseException as error:
            self.hub.fail(error)
        finally:
            self.hub.leave(lane)


# ------------------------------------------------------------------ the world
class VirtualWorld(Ranks):
    """The world of one logical rank, or a part of it.

    Args:
        hub: what all ranks share.
        where: rank, size, local rank and local size.
        parent: the whole world, if this is a part of one.
        driver: the second lane of this rank.
        path: identifies this world or part, and is the same on all of its ranks.
        members: its ranks, numbered in the whole world.
    """

    parent: VirtualWorld | None

    def __init__(
        self,
        hub: Hub,
        where: Where,
        parent: VirtualWorld | None = None,
        driver: ClockedDriver | None = None,
        path: tuple[object, ...] = (),
        members: tuple[int, ...] = (),
    ) -> None:
        super().__init__(where, math.inf, parent, driver)
        self.hub, self.path = hub, path
        self.members = members or tuple(range(self.size))
        self._flights: dict[str, VirtualFlight] = {}

    def sum(self, x: torch.Tensor, name: str) -> Flight:
        sent = 2 * (self.size - 1) / self.size * x.nbytes
        return self._post("sum", x, name, sent, lambda box: x.copy_(box.total()))

    def scatter(self, x: torch.Tensor, name: str) -> Flight:
        sent = (self.size - 1) / self.size * x.nbytes
        return self._post("scatter", x, name, sent, lambda box: self._own(x).copy_(self._own(box.total())))

    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Flight:
        sent = (self.size - 1) * x.nbytes
        kind = "equal gather" if equal else "gather"
        return self._post(kind, x, name, sent, lambda box: torch.cat(box.ordered()))

    def alltoall(self, x: torch.Tensor, name: str) -> Flight:
        sent = (self.size - 1) / self.size * x.nbytes
        return self._post("alltoall", x, name, sent, lambda box: torch.cat([self._own(part) for part in box.ordered()]))

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        sent = broadcast_sends(self.rank, root, self.size) * x.nbytes
        return self._post("broadcast", x, name, sent, lambda box: x.copy_(box.parts[root]), root)

    def adasum(self, x: torch.Tensor, name: str) -> Flight:
        """In place: x, one layer's mean gradient over this rank's tokens, becomes the Adasum of all ranks' x."""
        must_be_power_of_two(self.size)
        sent = 2 * (self.size - 1) / self.size * x.nbytes
        return self._post("adasum", x, name, sent, lambda box: x.copy_(adasum(box.ordered())))

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> VirtualWorld:
        mine = group_of(self.rank, groups, self.size)
        local = self._local(mine, name)
        where, members = (mine.index(self.rank), len(mine), *local), tuple(self.members[rank] for rank in mine)
        return VirtualWorld(self.hub, where, self, path=(*self.path, name, mine), members=members)

    def spend(self, seconds: float) -> None:
        """Lets this rank compute for so many seconds of the simulated clock."""
        self.hub.spend(seconds)

    def mail(self) -> VirtualMail:
        return VirtualMail(self)

    def spawn(self, work: Callable[[], None], name: str) -> None:
        number = max(lane.number for lane in self.hub.lanes) + 2  # after its own thread and its driver
        spawn(self.hub, Lane(self.rank, number), work, name)

    def rest(self, seconds: float) -> None:
        if self.hub.links is None:
            time.sleep(seconds)
        self.hub.poll(lambda: False)

    def close(self) -> None:
        if self.parent is None:
            self._driver.close()
            self.texts("", "world.close")

    def _own(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(self.size)[self.rank]

    def _post(
        self,
        kind: str,
        x: torch.Tensor,
        name: str,
        sent: float,
        finish: Callable[[Box], object],
        root: int | None = None,
    ) -> VirtualFlight:
        self.count(sent)
        last = self._flights.get(name)
        if last is not None and not last.seen:
            raise RuntimeError(f"rank {self.rank} launches {kind} `{name}` before it has seen its last use land")
        if kind in ("scatter", "alltoall") and len(x) % self.size:
            raise RuntimeError(f"{kind} `{name}`: {len(x)} rows are not dealt to {self.size} ranks")
        what = (kind, x.dtype, tuple(x.shape[1:] if kind == "gather" else x.shape), root)
        box = self.hub.open.setdefault((self.path, name), Box(what, self.size))
        if box.what != what:
            raise RuntimeError(f"`{name}` is {what} on rank {self.rank} and {box.what} on rank {min(box.parts)}")
        box.parts[self.rank], box.sent = x.detach().clone(), max(box.sent, sent)
        if box.full():
            del self.hub.open[self.path, name]
            box.at = self.hub.carry(self.members, self.members, box.sent)
        flight = VirtualFlight(self.hub, box, x, self.rank, name, lambda: finish(box))
        self._flights[name] = flight
        return flight


def run(
    size: int,
    body: Callable[[VirtualWorld], T],
    asks: Asks | None = None,
    hosts: int = 1,
    links: Links | None = None,
) -> list[T]:
    """Runs `body` on each of `size` logical ranks.

    Args:
        size: how many ranks there are.
        body: what a rank does.
        asks: where signals note what is asked; they become those of rank 0.
        hosts: how many logical hosts there are. Ranks are numbered host by host, with the same number on each.
        links: between hosts, or between all ranks if there is one host. With links there is a simulated clock, which is
          the time of these threads.

    Returns what `body` returns on each rank, in rank order.

    Raises the first failure of a rank, or what interrupts the calling thread. The ranks then end at their next wait.
    """
    if size % hosts:
        raise UserError(f"{size} logical ranks are not dealt to {hosts} hosts: world.size must be a multiple")
    local = size // hosts
    hub = Hub(links, local if hosts > 1 else 1)
    worlds = [
        VirtualWorld(hub, (rank, size, rank % local, local), driver=ClockedDriver(hub, rank)) for rank in range(size)
    ]
    if asks is not None:
        worlds[0].asks = asks
    results: dict[int, T] = {}

    def live(world: VirtualWorld, lane: Lane) -> None:
        hub.tell_time()
        try:
            hub.enter(lane)
            # Hooks run on this thread, also on a GPU: autograd's own thread has no clock, and all ranks would share it.
            with torch.autograd.set_multithreading_enabled(False):
                results[world.rank] = body(world)
        except BaseException as error:
            hub.fail(error)
        finally:
            world._driver.close()
            hub.leave(lane)

    state = torch.get_rng_state()
    hub.random = dict.fromkeys(range(size), state)
    hub.lanes = [Lane(rank, 0) for rank in range(size)]
    for world, lane in zip(worlds, list(hub.lanes), strict=True):
        device.start_thread(partial(live, world, lane), f"rank-{world.rank}")
    try:
        hub.pass_on()
        hub.over.wait()
    except BaseException as error:  # Ctrl-C, which only this thread gets
        hub.fail(error)
        hub.over.wait()  # a second Ctrl-C does not wait for the ranks
        raise
    finally:
        torch.set_rng_state(state)
    if hub.failure is not None:
        raise hub.failure
    return [results[rank] for rank in range(size)]
