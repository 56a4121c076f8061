"""batch = f(seed, position): the samples of a run and their order are the same for any number of ranks.

order/ says which item stands at a position. This module reads items ahead, copies them to the device and deals them.

round  `batch` items, from position round x batch on, dealt to the ranks as evenly as possible: each rank gets a
       consecutive share, and the first `batch % size` ranks get one item more
group  ranks that train together, apart from other groups: it walks a lane in rounds of its share of `batch`
client owner of whole documents; the ranks that it is dealt to train on its items
batch  a micro-batch: at most `micro_batch` items of a rank's share, for one forward pass
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import TypeVar

import numpy as np
import torch

from hvdllm import device as devices
from hvdllm import pulse
from hvdllm.errors import UserError
from hvdllm.order.clients import Clients
from hvdllm.order.epochs import Epochs, deal
from hvdllm.order.lanes import Lanes
from hvdllm.order.mixture import Mixture
from hvdllm.plain import Json, Tree
from hvdllm.task.base import Items

T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """One micro-batch of one rank. A rank without a share gets an empty one, which has no tensors and runs no graph."""

    inputs: Tree  # tensors [items, ...] on the device, or a dict, tuple or list of them
    targets: Tree  # the same
    tokens: int  # how many targets the loss counts
    last: bool  # closes this rank's share of the round
    round: int = 0  # as share() takes it; with `index` and the rank it seeds the dropout
    index: int = 0  # of this micro-batch in the rank's share
    fresh: int = 0  # bytes of text that the targets stand for, if a stream has brought them for the first time


class Loader:
    """Takes items, copies them to the device and makes micro-batches of them.

    Args:
        items: the data.
        micro_batch: the most items in one Batch.
        device: where the tensors go.
    """

    def __init__(self, items: Items, micro_batch: int, device: torch.device) -> None:
        self.items, self.micro_batch, self.device = items, micro_batch, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> Loaded:
        """These items in these epochs, copied or on their way to the device; None for none. Runs in the thread."""
        if not len(rows):
            return None
        step = self.micro_batch if getattr(self.items, "ragged", False) else len(rows)
        parts = [slice(at, at + step) for at in range(0, len(rows), step)]
        taken = [self.items.take(rows[part], None if epochs is None else epochs[part]) for part in parts]
        units = np.concatenate([units for _, _, units in taken])
        return self.copied([(inputs, targets) for inputs, targets, _ in taken], units)

    def copied(self, data: list[tuple[Tree, Tree]], units: np.ndarray) -> Loaded:
        """Inputs and targets, which lie on the CPU, copied or on their way to the device. Runs in the thread."""
        if self._copies is None:
            return data, units, None
        with torch.cuda.stream(self._copies):
            # The allocator does not give pinned memory away again before the copy out of it has run.
            there = each(data, lambda x: x.pin_memory().to(self.device, non_blocking=True))
            return there, units, self._copies.record_event()

    def arrive(self, loaded: Loaded, round: int) -> list[Batch]:
        """The micro-batches of a share, as views of the tensors that were taken. Runs in the loop's thread."""
        if loaded is None:
            return [Batch(None, None, 0, last=True, round=round)]
        data, units, copied = loaded
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)  # the device waits, the host does not
            # The memory belongs to the side stream, which must not reuse it while we read.
            each(data, lambda x: x.record_stream(here))
        parts = [slice(at, at + self.micro_batch) for at in range(0, len(units), self.micro_batch)]
        # What was taken at once is cut. Of ragged items each micro-batch was taken by itself.
        pairs = data if len(data) == len(parts) else [each(data[0], itemgetter(part)) for part in parts]
        counts = [int(units[part].sum()) for part in parts]
        return [Batch(x, y, counts[i], i == len(pairs) - 1, round, i) for i, (x, y) in enumerate(pairs)]


class Stream:
    """The micro-batches of one rank, read ahead by a thread of its own.

    rounds() moves the stream, share() does not, and state() is a few integers. `waited_s` is the time in seconds that
    the loop has waited for data. The first round is left out, because nothing could hide it.
    """

    ends_rounds = False

    def __init__(
        self,
        items: Items,
        *,
        batch: int,
        micro_batch: int,
        seed: int,
        rank: int,
        size: int,
        device: torch.device,
        ahead: int = 2,
    ) -> None:
        """Opens the stream at position 0.

        Args:
            items: the training data.
            batch: items in a round, over all ranks.
            micro_batch: the most items in one Batch.
            seed: of the order of items.
            rank, size: this rank, and the number of ranks.
            device: where the tensors go.
            ahead: how many rounds are kept ready.

        Raises UserError if there are fewer items than one round takes.
        """
        if len(items) < batch:
            raise UserError(items.too_few(batch))
        self.items, self.batch, self.micro_batch = items, batch, micro_batch
        self.seed, self.rank, self.size = seed, rank, size
        self.device, self.ahead = device, ahead
        self.position = 0  # items handed out to all ranks
        self.waited_s = 0.0
        self._federation: tuple[tuple[int, float | None], Federation] | None = None
        own = items.order(seed) if hasattr(items, "order") else None
        self._order: Epochs | Mixture = Epochs(len(items), seed) if own is None else own
        self._pool: ThreadPoolExecutor | None = None
        self._lanes = Lanes()
        self.loader = Loader(items, micro_batch, device)

    def share(self, round: int, parts: int = 1) -> list[Batch]:
        """This rank's micro-batches of one round.

        With parts > 1 a round is cut into parts of `batch / parts` items, and `round` counts parts. The function is
        pure: it gives any round, as often as asked, whatever rounds() has done.
        """
        return self.loader.arrive(self._load(round, self._part(parts)), round)

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        """share(t, parts) for every t from the position on, without end.

        state() counts a round as soon as it is yielded: saved after the last micro-batch of round t, the stream resumes
        with round t + 1.

        Raises what the thread raised, at the round that it could not make.
        """
        part = self._part(parts)
        if self.position % part:
            raise ValueError(f"position {self.position} is inside a part of {part} items")
        self.close()
        pool = self._pool = devices.pool("stream")
        first = self.position // part
        ready: deque[Future[Loaded]] = deque(
            pool.submit(self._load, first + k, part) for k in range(max(1, self.ahead))
        )
        try:
            while True:
                pulse.enter("data")
                since = time.perf_counter()
                loaded = ready.popleft().result()
                if self.position > first * part:
                    self.waited_s += time.perf_counter() - since
                self.position += part
                ready.append(pool.submit(self._load, self.position // part + len(ready), part))
                yield self.loader.arrive(loaded, self.position // part - 1)
        finally:
            pool.shutdown(cancel_futures=True)

    def lane(self, index: int, of: int, most: int) -> Iterator[Batch]:
        """Micro-batches without end, for walker `index` among `of`. The caller sets `last`.

        A micro-batch has `micro_batch` items, or as many as fit into `most` units if these are fewer, but at least one.

        There are as many lanes as there were walkers when the run began. If there are fewer walkers now, each has
        several lanes and takes the next micro-batch from the one that is least far on. Items that were read ahead and
        not handed out do not count as taken.
        """
        each = max(1, min(self.micro_batch, int(most // self.items.units)))
        for lane, at, loaded in self._walk(index, of, each, self._lanes.positions):
            (batch,) = self.loader.arrive(loaded, at)
            batch.index = lane  # with the place in the lane it seeds the dropout
            yield batch

    def group(self, index: int, of: int, rank: int, size: int) -> GroupStream:
        """The rounds of group `index` among `of`, for rank `rank` of the `size` ranks in the group."""
        return GroupStream(self, index, of, rank, size)

    def clients(self, count: int, alpha: float | None) -> Federation:
        """The items dealt to `count` clients, as unevenly as `alpha` says (see Clients).

        They are dealt once, because that may read all the data. Raises UserError if one of several clients would get
        all of the items.
        """
        if self._federation is None or self._federation[0] != (count, alpha):
            clients = Clients(self.items.documents(), self.items.units, count, alpha, self.seed)
            self._federation = (count, alpha), Federation(self, clients)
        return self._federation[1]

    def _walk(
        self, index: int, of: int, each: int, rows: Callable[[int, int, int], np.ndarray]
    ) -> Iterator[tuple[int, int, Loaded]]:
        """(lane, place in it, what was loaded) for every `each` items, without end.

        rows(lane, place, count) gives the positions of those that this rank loads.
        """
        mine = self._lanes.of_walker(index, of)
        planned = {lane: self._lanes.taken[lane] for lane in mine}

        def jobs() -> Iterator[tuple[tuple[int, int], Callable[[], Loaded]]]:
            while True:
                lane = min(mine, key=lambda lane: (planned[lane], lane))
                at, planned[lane] = planned[lane], planned[lane] + each
                yield (lane, at), partial(self._rows, rows(lane, at, each))

        for (lane, at), loaded in self._read_ahead(jobs()):
            self._lanes.taken[lane] = at + each
            yield lane, at, loaded

    def _read_ahead(self, jobs: Iterator[tuple[T, Callable[[], Loaded]]]) -> Iterator[tuple[T, Loaded]]:
        """The name of each job and what it has loaded, in order. Some jobs are always under way in the thread."""
        self.close()
        pool = self._pool = devices.pool("stream")
        ready = deque((called, pool.submit(job)) for called, job in islice(jobs, max(1, 2 * self.ahead)))
        first = True
        try:
            while ready:
                called, loading = ready.popleft()
                pulse.enter("data")
                since = time.perf_counter()
                loaded = loading.result()
                self.waited_s += 0.0 if first else time.perf_counter() - since
                first = False
                ready.extend((called, pool.submit(job)) for called, job in islice(jobs, 1))
                yield called, loaded
        finally:
            pool.shutdown(cancel_futures=True)

    def lanes(self) -> Json:
        """How far this rank has walked its lanes; {} without lanes."""
        return self._lanes.state()

    def state(self) -> dict[str, int]:
        """Where the stream stands: how many rounds were handed out, and the same place as epoch and item."""
        epoch, window = divmod(self.position, len(self.items))
        return {"round": self.position // self.batch, "epoch": epoch, "window": window, "windows": len(self.items)}

    def load(self, state: dict[str, int], lanes: Sequence[Json] = ()) -> None:
        """Goes to the place that state() and the lanes() of all ranks described, for any number of ranks.

        Ends what is under way.

        Raises UserError where the place does not exist with this text and this batch.
        """
        position = state["epoch"] * len(self.items) + state["window"]
        if state["windows"] != len(self.items) or state["round"] != position // self.batch:
            raise UserError(
                f"the checkpoint stands at round {state['round']} of {state['windows']} {self.items.name}, not of "
                f"{len(self.items)} at {self.batch} a batch: resume with the data and batch it was made with"
            )
        self.close()
        self.position = position
        self._lanes.load(lanes)

    def standing(self) -> dict[str, float]:
        """What a `commit` record says of data that arrives: nothing, since all of it is there."""
        return {}

    def saved(self) -> None:
        """A checkpoint with this place is whole. Items can always be read again, so nothing is to be done."""

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Takes the result of an evaluation, on which the order of items does not depend."""

    def close(self) -> None:
        """Ends the thread; rounds() may be called again."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _part(self, parts: int) -> int:
        if self.batch % parts:
            raise ValueError(f"a batch of {self.batch} {self.items.name} has no {parts} equal parts")
        return self.batch // parts

    def _load(self, number: int, part: int) -> Loaded:
        """This rank's share of part `number`, copied or on its way to the device. Runs in the thread."""
        first, count = deal(part, self.rank, self.size)
        if count == 0:
            return None
        return self._rows(np.arange(count) + number * part + first)

    def _rows(self, positions: np.ndarray) -> Loaded:
        """The items at these positions, copied or on their way to the device. Runs in the thread."""
        if not len(positions):
            return None
        return self.loader.take(*self._order.visits(positions))


class GroupStream:
    """The micro-batches of one rank if groups of ranks train apart; see Stream.group.

    The number of a round is the position of its first item, so that share() is pure.
    """

    def __init__(self, stream: Stream, index: int, of: int, rank: int, size: int) -> None:
        self.stream, self.index, self.of, self.rank, self.size = stream, index, of, rank, size
        self.count = deal(stream.batch, index, of)[1]  # that all ranks of the group take in a round

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        if parts != 1:
            raise ValueError(f"a group's rounds are not cut into {parts} parts")
        for lane, at, loaded in self.stream._walk(self.index, self.of, self.count, self._own):
            yield self.stream.loader.arrive(loaded, self._number(lane, at))

    def share(self, number: int, parts: int = 1) -> list[Batch]:
        at, lane = divmod(number, len(self.stream._lanes.taken))
        return self.stream.loader.arrive(self.stream._rows(self._own(lane, at, self.count)), number)

    def _number(self, lane: int, at: int) -> int:
        return lane + len(self.stream._lanes.taken) * at

    def _own(self, lane: int, at: int, count: int) -> np.ndarray:
        first, own = deal(count, self.rank, self.size)
        return self.stream._lanes.positions(lane, at + first, own)


class Federation:
    """Data that was dealt to clients; see Stream.clients."""

    def __init__(self, stream: Stream, clients: Clients) -> None:
        self.stream, self.clients, self.tokens = stream, clients, clients.tokens

    def sample(self, round: int, count: int | None) -> list[int]:
        return self.clients.sample(round, count)

    def walk(self, plan: Iterator[tuple[int, int]], of: int, rank: int, size: int) -> Turns:
        return Turns(self, plan, self.stream.batch // of, rank, size)


class Turns:
    """The micro-batches of one rank if clients are trained one after the other.

    Args:
        federation: the clients and their items.
        plan: for each round the client, and which of its steps this is.
        count: items in a step of a client.
        rank, size: this rank among those that share the clients' steps.

    The number of a round holds the number of the step and the client, so that share() is pure.
    """

    def __init__(self, federation: Federation, plan: Iterator[tuple[int, int]], count: int, rank: int, size: int):
        self.federation, self.plan, self.count, self.rank, self.size = federation, plan, count, rank, size

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        if parts != 1:
            raise ValueError(f"a client's rounds are not cut into {parts} parts")
        stream, of = self.federation.stream, len(self.federation.tokens)
        numbers = (step * of + client for client, step in self.plan)
        for number, loaded in stream._read_ahead((number, partial(self._load, number)) for number in numbers):
            yield stream.loader.arrive(loaded, number)

    def share(self, number: int, parts: int = 1) -> list[Batch]:
        return self.federation.stream.loader.arrive(self._load(number), number)

    def _load(self, number: int) -> Loaded:
        step, client = divmod(number, len(self.federation.tokens))
        first, own = deal(self.count, self.rank, self.size)
        positions = step * self.count + first + np.arange(own)
        return self.federation.stream.loader.take(*self.federation.clients.visits(client, positions))


# Pairs of inputs and targets (one, or one for each micro-batch of ragged items), the units that each item counts and,
# on CUDA, the event after the copies. None without a share.
Loaded = tuple[list[tuple[Tree, Tree]], np.ndarray, torch.cuda.Event | None] | None


def each(data: Tree, change: Callable[[torch.Tensor], object]) -> Tree:
    """The same data with every tensor changed; data are a tensor, or a dict, tuple or list of data."""
    if isinstance(data, dict):
        return {key: each(value, change) for key, value in data.items()}
    if isinstance(data, tuple | list):
        return type(data)(each(value, change) for value in data)
    return change(data) if isinstance(data, torch.Tensor) else data


def held_out(
    items: Items, *, units: int, micro_batch: int, rank: int, size: int, device: torch.device
) -> Iterator[tuple[Tree, Tree]]:
    """This rank's (inputs, targets) of an evaluation, on the device.

    They are always of the same items: the first of the held-out data, in their order, that count `units` units, rounded
    down to whole items, but to no less than one; 0 means all. They are dealt to the ranks like a batch, so a rank may
    get none.

    Raises UserError, at the call, if there is not a single item.
    """
    if not len(items):
        raise UserError(items.too_few(0))
    count = min(len(items), max(1, int(units // items.units))) if units else len(items)
    first, own = deal(count, rank, size)

    def batches() -> Iterator[tuple[Tree, Tree]]:
        for at in range(first, first + own, micro_batch):
            rows = np.arange(at, min(at + micro_batch, first + own))
            inputs, targets, _ = items.take(rows, None)
            yield each((inputs, targets), lambda x: x.to(device))

    return batches()
