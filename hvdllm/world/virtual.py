"""Many logical ranks as threads of one process, with exact and deterministic collectives. No launcher, no network.

Invariant: one thread runs at a time. The baton changes hands only where a rank waits for others, and goes to the
smallest (simulated time, rank, lane) that can go on, so two equal runs are bit-equal whatever the machine does. All
simulated times are 0 for now. A rank has two lanes: its own thread and its driver. Random state is swapped with
the baton: each rank draws as if it were alone.

Sums are taken in rank order, in the tensors' own dtype. For oracles at many ranks and for convergence experiments with
many workers; step times come only from real ranks.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from hvdllm.errors import PeerError, UserError
from hvdllm.world.base import Asks, Flight, first_problem


class Lane:
    """A thread that takes part in passing the baton."""

    def __init__(self, rank: int, number: int) -> None:
        self.place = (0.0, rank, number)  # simulated time first
        self.go = threading.Semaphore(0)
        self.ready: Callable[[], bool] = lambda: True


class Hub:
    """What the ranks of one process share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lanes: list[Lane] = []
        self.open: dict[Any, SimpleNamespace] = {}  # collectives that some rank has not joined yet
        self.random: dict[int, torch.Tensor] = {}
        self.holder: Lane | None = None
        self.failure: BaseException | None = None

    def wait(self, lane: Lane, ready: Callable[[], bool]) -> None:
        """Returns when `ready`; others run meanwhile. Raises PeerError once a rank has failed."""
        if not ready():
            lane.ready = ready
            self.pass_on()
            lane.go.acquire()
        if self.failure is not None:
            raise PeerError("another rank failed")

    def pass_on(self) -> None:
        """The baton goes to the first lane that can go on."""
        able = [lane for lane in self.lanes if self.failure is not None or lane.ready()]
        if not able and self.lanes:
            names = sorted({str(key[1]) for key in self.open})
            self.failure = RuntimeError(f"all ranks wait for each other, in {', '.join(names)}")
            able = self.lanes
        if not able:
            return
        chosen = min(able, key=lambda lane: lane.place)
        if self.holder is not None and self.holder.place[1] != chosen.place[1]:
            self.random[self.holder.place[1]] = torch.get_rng_state()
            if chosen.place[1] in self.random:
                torch.set_rng_state(self.random[chosen.place[1]])
        self.holder = chosen
        chosen.go.release()

    def leave(self, lane: Lane) -> None:
        self.lanes.remove(lane)
        self.pass_on()


class VirtualFlight:
    """One collective; `value` is called once all ranks have joined."""

    def __init__(self, world: VirtualWorld, box: SimpleNamespace, value: Callable[[list[torch.Tensor]], Any]) -> None:
        self.world, self.box, self._value = world, box, value
        self._landed: Any = None
        self._read = False

    def landed(self) -> bool:
        return len(self.box.parts) == self.box.size

    def land(self) -> Any:
        if not self._read:
            self.world.hub.wait(self.world.lane(), self.landed)
            self._landed, self._read = self._value([self.box.parts[r] for r in sorted(self.box.parts)]), True
        return self._landed


class VirtualDriven:
    def __init__(self, world: VirtualWorld) -> None:
        self.world, self.done, self.value = world, False, None

    def landed(self) -> bool:
        return self.done

    def land(self) -> Any:
        self.world.hub.wait(self.world.lane(), self.landed)
        return self.value


class VirtualWorld:
    """Logical rank `ranks.index(me)` of those `ranks` of the hub."""

    def __init__(self, hub: Hub, me: int, ranks: tuple[int, ...], parent: VirtualWorld | None = None) -> None:
        self.hub, self.me, self.ranks, self.parent = hub, me, ranks, parent
        self.rank, self.size = ranks.index(me), len(ranks)
        self.local_rank, self.local_size = self.rank, self.size
        self.asks = parent.asks if parent else Asks()
        self.bytes_sent = 0.0
        self._main: Lane = parent._main if parent else Lane(me, 0)
        self._lanes: dict[int, Lane] = parent._lanes if parent else {}
        self._queue: deque[tuple[VirtualDriven, Callable[[], Any]]] = parent._queue if parent else deque()
        self._over = False

    # ------------------------------------------------------------------ collectives
    def sum(self, x: torch.Tensor, name: str) -> Flight:
        def finish(box: SimpleNamespace) -> None:
            total = _total(box)
            for part in box.parts.values():
                part.copy_(total)

        self._count(2 * (self.size - 1) / self.size * x.nbytes)
        return self._post("sum", x, name, lambda parts: x, finish)

    def scatter(self, x: torch.Tensor, name: str) -> Flight:
        def finish(box: SimpleNamespace) -> None:
            box.total = _total(box)

        self._count((self.size - 1) / self.size * x.nbytes)
        flight = self._post("scatter", x, name, lambda parts: flight.box.total.chunk(self.size)[self.rank], finish)
        return flight

    def gather(self, x: torch.Tensor, name: str) -> Flight:
        self._count((self.size - 1) * x.nbytes)
        return self._post("gather", x.clone(), name, torch.cat)

    def alltoall(self, x: torch.Tensor, name: str) -> Flight:
        self._count((self.size - 1) / self.size * x.nbytes)
        return self._post(
            "alltoall", x.clone(), name, lambda parts: torch.cat([part.chunk(self.size)[self.rank] for part in parts])
        )

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        def finish(box: SimpleNamespace) -> None:
            for part in box.parts.values():
                part.copy_(box.parts[root])

        self._count((self.size - 1) * x.nbytes if self.rank == root else 0)
        return self._post("broadcast", x, name, lambda parts: x, finish)

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> VirtualWorld:
        mine = next(group for group in groups if self.rank in group)
        return VirtualWorld(self.hub, self.me, tuple(self.ranks[r] for r in mine), self)

    def texts(self, text: str, name: str) -> list[str]:
        own = torch.tensor(list(text.encode()), dtype=torch.uint8)
        flight = self._post("texts", own, name, lambda parts: [bytes(part.tolist()).decode() for part in parts])
        texts: list[str] = flight.land()
        return texts

    def agree(self, problem: str | None, name: str) -> None:
        if said := first_problem(self.texts(problem or "", name)):
            raise UserError(said)

    def close(self) -> None:
        self.texts("", "world.close")

    def _count(self, size: float) -> None:
        world: VirtualWorld | None = self
        while world is not None:
            world.bytes_sent += size
            world = world.parent

    def _post(
        self,
        kind: str,
        x: torch.Tensor,
        name: str,
        value: Callable[[list[torch.Tensor]], Any],
        finish: Callable[[SimpleNamespace], None] | None = None,
    ) -> VirtualFlight:
        key = (self.ranks, name)
        box = self.hub.open.setdefault(key, SimpleNamespace(kind=kind, parts={}, size=self.size))
        if box.kind != kind or self.rank in box.parts:
            raise RuntimeError(f"rank {self.rank} launches {kind} `{name}`, but a {box.kind} of that name is under way")
        box.parts[self.rank] = x
        if len(box.parts) == self.size:
            del self.hub.open[key]
            if finish is not None:
                finish(box)
        return VirtualFlight(self, box, value)

    # ------------------------------------------------------------------ lanes
    def lane(self) -> Lane:
        """That of the calling thread."""
        return self._lanes.get(threading.get_ident(), self._main)

    def drive(self, work: Callable[[], Any]) -> Flight:
        if self.parent is not None:
            return self.parent.drive(work)
        flight = VirtualDriven(self)
        self._queue.append((flight, work))
        if not self._lanes:
            lane = Lane(self.me, 1)
            lane.ready = lambda: bool(self._queue) or self._over
            thread = threading.Thread(target=self._drive, args=(lane,), daemon=True, name=f"driver-{self.me}")
            self.hub.lanes.append(lane)
            self._lanes[-1] = lane  # until the thread knows its number
            thread.start()
        return flight

    def _drive(self, lane: Lane) -> None:
        lane.go.acquire()
        self._lanes[threading.get_ident()] = lane
        try:
            while True:
                self.hub.wait(lane, lambda: bool(self._queue) or self._over)
                if not self._queue:
                    break
                flight, work = self._queue.popleft()
                flight.value = work()
                flight.done = True
        except BaseException as error:
            self.hub.failure = self.hub.failure or error
        finally:
            self.hub.leave(lane)

    def over(self) -> None:
        """No more work will be driven."""
        self._over = True


def _total(box: SimpleNamespace) -> torch.Tensor:
    first, *rest = (box.parts[r] for r in sorted(box.parts))
    total = first.clone()
    for part in rest:
        total += part
    return total


def run(size: int, body: Callable[[VirtualWorld], Any], asks: Asks | None = None) -> list[Any]:
    """What `body` returns on each of `size` logical ranks, in rank order. asks: rank 0's, for signals.

    Raises the first rank's failure that is its own; the others end.
    """
    hub = Hub(size)
    worlds = [VirtualWorld(hub, rank, tuple(range(size))) for rank in range(size)]
    if asks is not None:
        worlds[0].asks = asks
    results: list[Any] = [None] * size
    state = torch.get_rng_state()
    hub.random = {rank: state for rank in range(size)}

    def live(world: VirtualWorld) -> None:
        lane = world._main
        lane.go.acquire()
        try:
            if hub.failure is None:
                results[world.me] = body(world)
        except BaseException as error:
            if not (isinstance(error, PeerError) and hub.failure is not None):
                hub.failure = hub.failure or error
        finally:
            world.over()
            hub.leave(lane)

    hub.lanes = [world._main for world in worlds]
    threads = [
        threading.Thread(target=live, args=(world,), daemon=True, name=f"rank-{world.me}") for world in worlds
    ]
    for thread in threads:
        thread.start()
    hub.pass_on()
    for thread in threads:
        while thread.is_alive():  # in steps, so that the main thread hears signals
            thread.join(0.5)
    if hub.failure is not None:
        raise hub.failure
    return results
