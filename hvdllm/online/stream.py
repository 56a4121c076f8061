"""The micro-batches of a stream: rounds of what has arrived, agreed on by all ranks through the files of the log."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from hvdllm import device as devices
from hvdllm import pulse
from hvdllm.errors import UserError
from hvdllm.exchange.base import Federation, Nothing
from hvdllm.online.decider import Decider
from hvdllm.online.waiting import Waiting
from hvdllm.online.windows import LogItems, slices_of
from hvdllm.order.epochs import deal
from hvdllm.plain import Json
from hvdllm.task.base import Source, Task
from hvdllm.task.stream import Batch, Loaded, Loader
from hvdllm.world.base import World, from_first

DRY_S = 0.2  # seconds after which a rank whose exchange has marks without it walks the loop on empty batches
LANES_AHEAD = 64  # rounds that rank 0 decides before it needs them, where ranks go on by themselves


@dataclass(frozen=True)
class Share:
    """What a rank has loaded of a round.

    Attributes:
        loaded: its fresh windows, and those of the past.
        spelled: bytes of text that the targets of each fresh micro-batch stand for.
    """

    loaded: list[Loaded]
    spelled: list[int]


class LogStream:
    """The micro-batches of one rank; see exchange/base.py, Stream.

    Args:
        decider: says which windows a round has.
        waiting: where the loop waits for a round.
        micro_batch: the most windows in one Batch.
        seed: of the run.
        rank, size: this rank, and the number of ranks.
        device: where the tensors go.
        ahead: how many rounds are kept ready.
    """

    ends_rounds = True

    def __init__(
        self, decider: Decider, waiting: Waiting, *, micro_batch: int, seed: int, rank: int, size: int,
        device: torch.device, ahead: int = 2,
    ) -> None:  # fmt: skip
        self.decider, self.waiting, self.micro_batch, self.seed = decider, waiting, micro_batch, seed
        self.rank, self.size, self.ahead = rank, size, ahead
        self.loader = Loader(decider.items, micro_batch, device)
        self._parts = 1
        self._position = 0  # parts of rounds that were handed out
        self._lane: list[int] | None = None  # of a lane: number of walkers, next round, micro-batches of it handed out
        self._pool = devices.pool("stream")

    @property
    def batch(self) -> int:
        """Windows of a whole round."""
        return self.decider.plan.batch

    @property
    def items(self) -> LogItems:
        """The windows of the log."""
        return self.decider.items

    @property
    def waited_s(self) -> float:
        """Seconds that the loop has waited for data."""
        return self.waiting.waited_s

    # ------------------------------------------------------------------ rounds
    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        """share(t, parts) for every t from the position on; ends only if a pause asks for a stop."""
        self._parts = parts

        def load(number: int) -> Share:
            return self._load(number, parts, 0, 1, self.rank, self.size)

        for number, loading in self._walk(self._position, load, parts):
            self._position = number + 1
            yield self._arrive(loading.result(), number)

    def share(self, round: int, parts: int = 1) -> list[Batch]:
        """This rank's micro-batches of one round that was decided, or of one of its parts. It is pure."""
        return self._arrive(self._load(round, parts, 0, 1, self.rank, self.size), round)

    def group(self, index: int, of: int, rank: int, size: int) -> GroupOfLog:
        """The rounds of group `index` among `of`, for rank `rank` of the `size` ranks in the group."""
        return GroupOfLog(self, index, of, rank, size)

    def lane(self, index: int, of: int, most: int) -> Iterator[Batch | Nothing]:
        """The micro-batches of walker `index` among `of`: its share of each round, or empty ones if none is there."""
        self._lane = self._lane or [of, 0, 0]
        if self._lane[0] != of:
            raise UserError(
                f"the stream was dealt to {self._lane[0]} workers, which have read it to different places: go on with "
                f"as many, not with {of}"
            )
        dry = 0.0
        while True:
            number = self._lane[1]
            if not self.decider.ready(number, dry):
                self.waiting.end_if(self.decider.over())
                self.waiting.stand(DRY_S)
                dry += DRY_S
                yield Nothing()
                continue
            dry = 0.0
            self.waiting.came()
            for later in range(number + 1, number + LANES_AHEAD) if self.rank == 0 else ():  # others may be faster
                if self.decider.decided(later) is None:
                    break
            batches = self._arrive(self._load(number, 1, index, of, 0, 1), number)
            for at in range(self._lane[2], len(batches)):
                self._lane[2] = at + 1
                if batches[at].tokens:
                    yield batches[at]
            self._lane = [of, number + 1, 0]

    def clients(self, count: int, alpha: float | None) -> Federation:
        raise UserError("a stream is dealt to no clients: take another exchange than fedavg")

    def _walk(self, begin: int, load: Callable[[int], Share], parts: int = 1) -> Iterator[tuple[int, Future[Share]]]:
        """The number of each part of a round and what is loaded of it, read ahead as far as rounds are decided."""
        ready: deque[tuple[int, Future[Share]]] = deque()
        following = begin
        while True:
            while len(ready) < max(1, self.ahead) * parts and self.decider.decided(following // parts) is not None:
                ready.append((following, self._pool.submit(load, following)))
                following += 1
            if not ready:
                if not self._wait(following // parts):
                    return
                continue
            number, loading = ready.popleft()
            pulse.enter("data")
            since = time.perf_counter()
            loading.result()
            self.waiting.waited_s += time.perf_counter() - since
            yield number, loading

    def _wait(self, number: int) -> bool:
        """Waits until a round is decided. False if the run is to end."""
        return self.waiting.until(lambda waited_s: self.decider.ready(number, waited_s), self.decider.over)

    # ------------------------------------------------------------------ what is loaded
    def _load(self, number: int, parts: int, index: int, of: int, rank: int, size: int) -> Share:
        """A share of one part of a round: of group `index` among `of` the part of rank `rank` among `size`."""
        place, part = divmod(number, parts)
        rows, fresh = self.decider.windows(place, self.seed)
        out = []
        for chosen, turned in ((rows[fresh], False), (rows[~fresh], True)):
            for number_of, count in ((part, parts), (index, of), (rank, size)):
                # What is left over of the past goes to those who got less of the fresh windows.
                first, own = deal(len(chosen), count - 1 - number_of if turned else number_of, count)
                chosen = chosen[first : first + own]
            out.append(chosen)
        spelled, loaded = [], []
        for chosen in out:
            inputs, targets, units = self.items.take(chosen, None)
            if chosen is out[0]:
                begins = range(0, len(chosen), self.micro_batch)
                spelled = [self.items.spelled(targets[at : at + self.micro_batch]) for at in begins]
            loaded.append(self.loader.copied([(inputs, targets)], units) if len(chosen) else None)
        return Share(loaded, spelled)

    def _arrive(self, share: Share, number: int) -> list[Batch]:
        batches = [batch for some in share.loaded if some is not None for batch in self.loader.arrive(some, number)]
        if not batches:
            return [Batch(None, None, 0, last=True, round=number)]
        for index, batch in enumerate(batches):
            batch.index, batch.last = index, index == len(batches) - 1
            batch.fresh = share.spelled[index] if index < len(share.spelled) else 0
        return batches

    # ------------------------------------------------------------------ checkpoint
    @property
    def round(self) -> int:
        """The next round of this rank."""
        return self._lane[1] if self._lane is not None else self._position // self._parts

    def state(self) -> dict[str, int]:
        """Where the stream stands. The rounds before that place are on the disk of rank 0."""
        if self.rank == 0 and self.round:
            self.decider.rounds.sync()
        return {"part": self._position, "parts": self._parts}

    def lanes(self) -> Json:
        """Where this rank's lane stands; {} without lanes."""
        return {"lane": self._lane} if self._lane is not None else {}

    def load(self, state: dict[str, int], lanes: list[Json] = ()) -> None:  # type: ignore[assignment]
        """Goes to the place that state() and the lanes() of all ranks described.

        Raises UserError if the log has no such round, or if the lanes are those of another number of ranks.
        """
        self._position, self._parts = state["part"], state["parts"]
        if walked := [each["lane"] for each in lanes if each]:
            if self.rank >= len(lanes) or len(lanes) != self.size:
                raise UserError(
                    f"the stream was read by {len(lanes)} ranks to different places: go on with as many, not "
                    f"{self.size}"
                )
            self._lane = list(lanes[self.rank]["lane"]) if lanes[self.rank] else list(walked[0])
        rounds = self.decider.rounds
        if self.round and rounds.get(self.round - 1) is None:
            raise UserError(f"{rounds.path} has no round {self.round - 1}, which was trained on: copy the log again")

    # ------------------------------------------------------------------ at a mark
    def saved(self) -> None:
        """A checkpoint with this place is whole, so the source may forget what was trained on."""
        self.decider.saved(self.round)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Takes the losses of slices, by which later rounds draw from the past. Raises RunError if a disk refuses."""
        # Rounds are decided ahead. Where nothing had to be waited for, this is the same place in every life of the run.
        ahead = LANES_AHEAD if self._lane is not None else self.ahead + 1
        self.decider.evaluated(self.round, self.round + ahead, metrics)

    def slices(self, task: Task) -> Callable[[World], dict[str, Source]]:
        """The held-out windows of the slices that all ranks have trained past, as parts of an evaluation."""

        def found(world: World) -> dict[str, Source]:
            layout, place = self.decider.layout, self.decider.place(self.round)
            whole = from_first(world, lambda: place // layout.slice, "act.slices")
            return slices_of(self.items, layout, whole, task)

        return found

    def standing(self) -> dict[str, float]:
        """What a `commit` record says of what arrives."""
        return self.decider.standing(self.round)

    def close(self) -> None:
        """Ends the thread and the reader; rounds() may not be called again."""
        if self.decider.readers is not None:
            self.decider.readers.close()
        self._pool.shutdown(cancel_futures=True)


class GroupOfLog:
    """The micro-batches of one rank if groups of ranks train apart; see LogStream.group."""

    def __init__(self, stream: LogStream, index: int, of: int, rank: int, size: int) -> None:
        self.stream, self.place = stream, (index, of, rank, size)

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        if parts != 1:
            raise ValueError(f"a group's rounds are not cut into {parts} parts")
        for number, loading in self.stream._walk(self.stream._position, self._load):
            self.stream._position = number + 1
            yield self.stream._arrive(loading.result(), number)

    def share(self, number: int, parts: int = 1) -> list[Batch]:
        return self.stream._arrive(self._load(number), number)

    def _load(self, number: int) -> Share:
        return self.stream._load(number, 1, *self.place)
