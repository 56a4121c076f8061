"""The micro-batches of a stream: rounds of what has arrived, agreed on by all ranks through the files of the log.

The loop waits where nothing has arrived, and looks again every POLL_S seconds. If a rank is asked to stop or to save
while it waits, rank 0 announces a pause: all ranks then stand before the same round, save there, and go on or end.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hvdllm import device as devices
from hvdllm import untrusted
from hvdllm.errors import RunError, UserError
from hvdllm.exchange.base import Federation, Nothing
from hvdllm.online.intake import Intake
from hvdllm.online.log import Entry, Log
from hvdllm.online.rounds import Layout, Losses, Plan, Round, Rounds, windows_of
from hvdllm.order.epochs import deal
from hvdllm.plain import Json
from hvdllm.task.base import Source, Task
from hvdllm.task.stream import Batch, Loaded, Loader
from hvdllm.world.base import Asks, World, from_first

POLL_S = 0.02
NEWEST, OLDER = 4, 8  # slices that are evaluated
DRY_S = 0.2  # seconds after which a rank whose exchange has marks without it walks the loop on empty batches
LANES_AHEAD = 64  # rounds that rank 0 decides before it needs them, where ranks go on by themselves
TELL_S = 10.0  # seconds of waiting after which the user is told
OF_SLICE = "loss/slice-"  # and its number: the name of its loss in an evaluation
MOST = 2**20  # bytes of the files in which ranks tell each other of asks


class LogItems:
    """The windows of a log, by number (rounds.py), as items of a task. Those behind its end cannot be taken.

    Args:
        log: of the stream.
        context: tokens in a window.
        token_bytes: of text that each token stands for, int64 [vocab].
    """

    name = "windows"

    def __init__(self, log: Log, context: int, token_bytes: np.ndarray) -> None:
        self.log, self.context, self.units, self._bytes = log, context, float(context), token_bytes

    def __len__(self) -> int:
        return max(0, self.log.last.tokens - 1) // self.context

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        """Inputs and targets, each int64 [rows, context]. Raises UserError if the log holds tokens of another one."""
        picked = np.empty((len(rows), self.context + 1), np.int64)
        for i, row in enumerate(rows):
            picked[i] = self.log.tokens(int(row) * self.context, self.context + 1)
        if picked.max(initial=0) >= len(self._bytes):
            raise UserError(f"{self.log.folder} holds tokens that its tokenizer has not: copy the log again")
        inputs, targets = (torch.from_numpy(np.ascontiguousarray(x)) for x in (picked[:, :-1], picked[:, 1:]))
        return inputs, targets, np.full(len(rows), self.context)

    def spelled(self, targets: torch.Tensor) -> int:
        """Bytes of text that targets on the CPU stand for."""
        return int(self._bytes[targets.numpy()].sum())

    def documents(self) -> np.ndarray:
        raise UserError("a stream is dealt to no clients: take another exchange than fedavg")

    def too_few(self, batch: int) -> str:
        return "nothing of the stream has arrived yet: look whether its source runs, or set eval_every=0"


@dataclass(frozen=True)
class Share:
    """What a rank has loaded of a round.

    Attributes:
        loaded: its fresh windows, and those of the past.
        spelled: bytes of text that the targets of each fresh micro-batch stand for.
    """

    loaded: list[Loaded]
    spelled: list[int]


class Pauses:
    """What ranks that wait are asked, and what rank 0 announces of it, in files that belong to one life of a run."""

    def __init__(self, folder: Path, life: str, rank: int) -> None:
        self.folder, self.life, self.rank = folder, life, rank
        self._heard = 0

    def _file(self, rank: int) -> Path:
        return self.folder / f"asked-{self.life}-{rank}.jsonl"

    def ask(self, asks: Asks) -> None:
        """Passes on what this rank is asked."""
        if asks.stop or asks.save:
            with untrusted.appended(self._file(self.rank)) as file:
                file.write(json.dumps([asks.stop, asks.save]) + "\n")

    def asked(self, size: int) -> Asks:
        """On rank 0: what all ranks have passed on since the last call."""
        found = Asks()
        for rank in range(1, size):
            try:
                lines = untrusted.read(self._file(rank), MOST).splitlines()
                self._file(rank).unlink()
            except (OSError, untrusted.Unfit):
                continue
            for stop, save in map(json.loads, lines):
                found.stop, found.save = found.stop or stop, found.save or save
        return found

    def announce(self, asks: Asks) -> None:
        """On rank 0: all ranks act on this before the round that they wait for."""
        with untrusted.appended(self.folder / f"pauses-{self.life}.jsonl") as file:
            file.write(json.dumps([asks.stop, asks.save]) + "\n")
        self._heard += 1

    def heard(self) -> Asks | None:
        """On the other ranks: the next announcement, once."""
        try:
            lines = untrusted.read(self.folder / f"pauses-{self.life}.jsonl", MOST).split(b"\n")[:-1]
        except (OSError, untrusted.Unfit):
            return None
        if len(lines) <= self._heard:
            return None
        self._heard += 1
        return Asks(*json.loads(lines[self._heard - 1]))


class SliceItems:
    """The windows of a slice that are held out."""

    name = "windows"

    def __init__(self, items: LogItems, windows: np.ndarray) -> None:
        self._items, self._windows, self.units = items, windows, items.units

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, rows: np.ndarray, epochs: np.ndarray | None) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
        return self._items.take(self._windows[rows], epochs)

    def documents(self) -> np.ndarray:
        return self._windows

    def too_few(self, batch: int) -> str:
        return self._items.too_few(batch)


def shown(slices: int) -> list[int]:
    """The slices that are evaluated when so many are whole: the newest, and older ones at equal distances that grow by
    powers of two. A slice that is left out once is never evaluated again."""
    each = 1
    while slices > NEWEST and (slices - NEWEST) // each >= OLDER:
        each *= 2
    return [k for k in range(slices) if k >= slices - NEWEST or k % each == 0]


def slices_of(items: LogItems, layout: Layout, whole: int, task: Task) -> dict[str, Source]:
    """The held-out windows of slices as parts of an evaluation, if `whole` slices were trained past."""
    chosen = shown(whole)
    parts = [SliceItems(items, layout.held_out(k)) for k in chosen]
    return {f"slice-{k}": Source(task, each, 1 / len(chosen)) for k, each in zip(chosen, parts, strict=True)}


class LogStream:
    """The micro-batches of one rank; see exchange/base.py, Stream.

    Args:
        items: the windows of the log.
        rounds: that were decided.
        layout: where windows lie.
        plan: how rank 0 decides.
        micro_batch: the most windows in one Batch.
        seed: of the run.
        rank, size: this rank, and the number of ranks.
        device: where the tensors go.
        wait_s: seconds that the loop waits for a whole batch, before a round is made of what there is.
        asks: what this rank is asked.
        pauses: how ranks agree on asks while they wait.
        rest: waits for so many seconds, as World.rest.
        say: gets a sentence when the loop has to wait.
        ahead: how many rounds are kept ready.

    Attributes:
        waited_s: seconds that the loop has waited for data.
        paused: is called on all ranks, before the same round, with what was asked.
        intake: reads the source, on rank 0; None if something else appends to the log.
        still: nothing is appended to the log.
        losses: by which the past is weighted; None if all of it is alike.
    """

    ends_rounds = True

    def __init__(
        self, items: LogItems, rounds: Rounds, layout: Layout, plan: Plan, *, micro_batch: int, seed: int, rank: int,
        size: int, device: torch.device, wait_s: float, asks: Asks, pauses: Pauses,
        rest: Callable[[float], None], say: Callable[[str], None] = lambda text: None, ahead: int = 2,
    ) -> None:  # fmt: skip
        self.items, self.rounds_file, self.layout, self.plan = items, rounds, layout, plan
        self.micro_batch, self.seed, self.rank, self.size = micro_batch, seed, rank, size
        self.wait_s, self.asks, self.pauses, self.rest, self.say, self.ahead = wait_s, asks, pauses, rest, say, ahead
        self.loader = Loader(items, micro_batch, device)
        self.waited_s = 0.0
        self.paused: Callable[[Asks], None] = lambda asks: None
        self.intake: Intake | None = None
        self.still = False
        self.losses: Losses | None = None
        self._unforgotten: deque[Entry] = deque()  # entries of the log that the source has not been told to forget
        self._parts = 1
        self._position = 0  # parts of rounds that were handed out
        self._lane: list[int] | None = None  # of a lane: number of walkers, next round, micro-batches of it handed out
        self._quiet = 0.0  # seconds that were waited since the last round
        self._asked_to_end = False
        self._pool = devices.pool("stream")

    @property
    def batch(self) -> int:
        """Windows of a whole round."""
        return self.plan.batch

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
            if self._decided(number) is None and not self._short(number, dry):
                self.rest(DRY_S)
                dry, self.waited_s = dry + DRY_S, self.waited_s + DRY_S
                self._tell(DRY_S)
                yield Nothing()
                continue
            dry = self._quiet = 0.0
            for later in range(number + 1, number + LANES_AHEAD) if self.rank == 0 else ():  # others may be faster
                if self._decided(later) is None:
                    break
            batches = self._arrive(self._load(number, 1, index, of, 0, 1), number)
            for at in range(self._lane[2], len(batches)):
                self._lane[2] = at + 1
                if batches[at].tokens:
                    yield batches[at]
            self._lane = [of, number + 1, 0]

    def clients(self, count: int, alpha: float | None) -> Federation:
        raise UserError("a stream is dealt to no clients: take another exchange than fedavg")

    # ------------------------------------------------------------------ what is decided
    def _walk(self, begin: int, load: Callable[[int], Share], parts: int = 1) -> Iterator[tuple[int, Future[Share]]]:
        """The number of each part of a round and what is loaded of it, read ahead as far as rounds are decided."""
        ready: deque[tuple[int, Future[Share]]] = deque()
        following = begin
        while True:
            while len(ready) < max(1, self.ahead) * parts and self._decided(following // parts) is not None:
                ready.append((following, self._pool.submit(load, following)))
                following += 1
            if not ready:
                if not self._wait(following // parts):
                    return
                continue
            number, loading = ready.popleft()
            since = time.perf_counter()
            loading.result()
            self.waited_s += time.perf_counter() - since
            yield number, loading

    def _decided(self, number: int) -> Round | None:
        """A round, if it is decided. Rank 0 decides it as soon as a whole batch is there."""
        found = self.rounds_file.get(number)
        if found is None and self.rank == 0:
            found = self._decide(number, self.plan.whole)
        return found

    def _decide(self, number: int, rule: Callable[[int, int], Round | None]) -> Round | None:
        before = self.rounds_file.get(number - 1) if number else None
        if number and before is None:
            raise RunError(f"{self.rounds_file.path} has no round {number - 1}: the log was cut, copy it again")
        self._look()
        found = rule(before.next if before else self.plan.begin, self.layout.fresh(self.items.log.last.tokens))
        if found is not None:
            try:
                self.rounds_file.add(number, found)
            except OSError as error:
                raise RunError(f"{self.rounds_file.path} cannot be written ({error.strerror}): make room") from None
        return found

    def _look(self) -> None:
        """Looks at what has arrived. Raises RunError if nothing can arrive any more."""
        found = self.items.log.refresh()
        if self.intake is not None:
            self._unforgotten.extend(found)
            self.intake.check()

    @property
    def _over(self) -> bool:
        """Whether nothing more will arrive, as rank 0 knows."""
        return self.still or bool(self.items.log.last.at.get("over"))

    def _wait(self, number: int) -> bool:
        """Waits until a round is decided, and acts on what is asked meanwhile. False if the run is to end."""
        since = time.monotonic()
        try:
            while self._decided(number) is None:
                if self._short(number, time.monotonic() - since):
                    break
                if (asks := self._asked()) is not None:
                    self.paused(asks)
                    if asks.stop:
                        return False
                self.rest(POLL_S)
                self._tell(POLL_S)
        finally:
            self.waited_s += time.monotonic() - since
        self._quiet = 0.0
        return True

    def _short(self, number: int, waited_s: float) -> bool:
        """Whether rank 0 makes a round of what there is, because the loop has waited so long or nothing more comes.
        Where nothing more comes and nothing is left, all ranks are asked to stop."""
        if self.rank or not (self._over or waited_s >= self.wait_s):
            return False
        if self._decide(number, self.plan.short) is not None:
            return True
        if self._over and not self._asked_to_end:
            self._asked_to_end = self.asks.stop = self.asks.save = True
        return False

    def _asked(self) -> Asks | None:
        """What all ranks are asked before the next round, or None."""
        own = self.asks.take()
        if self.rank:
            self.pauses.ask(own)
            return self.pauses.heard()
        others = self.pauses.asked(self.size)
        found = Asks(own.stop or others.stop, own.save or others.save)
        if not (found.stop or found.save):
            return None
        self.pauses.announce(found)
        return found

    def _tell(self, seconds: float) -> None:
        before, self._quiet = self._quiet, self._quiet + seconds
        if self.rank == 0 and before < TELL_S <= self._quiet:
            self.say(f"waiting for text: nothing has arrived for {TELL_S:.0f} s, training goes on when it does")

    # ------------------------------------------------------------------ what is loaded
    def _load(self, number: int, parts: int, index: int, of: int, rank: int, size: int) -> Share:
        """A share of one part of a round: of group `index` among `of` the part of rank `rank` among `size`."""
        place, part = divmod(number, parts)
        round = self.rounds_file.get(place)
        if round is None:
            raise UserError(f"{self.rounds_file.path} has no round {place}: copy the log again")
        losses = self.losses.of(place) if self.losses is not None and round.past else None
        rows, fresh = windows_of(round, place, self.layout, self.seed, losses)
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
        """Where the stream stands."""
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
        if self.round and self.rounds_file.get(self.round - 1) is None:
            raise UserError(
                f"{self.rounds_file.path} has no round {self.round - 1}, which was trained on: copy the log again"
            )

    def saved(self) -> None:
        """A checkpoint with this place is whole, so the source may forget what was trained on."""
        if self.intake is None or self.round == 0 or (before := self.rounds_file.get(self.round - 1)) is None:
            return
        trained = self.layout.place(before) * self.items.context
        last = None
        while self._unforgotten and self._unforgotten[0].tokens <= trained:
            last = self._unforgotten.popleft()
        if last is not None:
            self.intake.forget(last.at)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Takes the losses of slices, by which later rounds draw from the past. Raises RunError if a disk refuses."""
        if self.losses is None or self.rank:
            return
        losses = {int(key.removeprefix(OF_SLICE)): x for key, x in metrics.items() if key.startswith(OF_SLICE)}
        # Rounds are decided ahead. Where nothing had to be waited for, this is the same place in every life of the run.
        since = self.round + (LANES_AHEAD if self._lane is not None else self.ahead + 1)
        try:
            self.losses.add(self.round, max(since, self.rounds_file.count()), losses)
        except OSError as error:
            raise RunError(f"{self.losses.path} cannot be written ({error.strerror}): make room") from None

    def slices(self, task: Task) -> Callable[[World], dict[str, Source]]:
        """The held-out windows of the slices that all ranks have trained past, as parts of an evaluation."""

        def found(world: World) -> dict[str, Source]:
            place = self.layout.place(self.rounds_file.get(self.round - 1) if self.round else None)
            whole = from_first(world, lambda: place // self.layout.slice, "act.slices")
            return slices_of(self.items, self.layout, whole, task)

        return found

    def standing(self) -> dict[str, float]:
        """On rank 0: documents that have arrived, and tokens of them that wait to be trained on."""
        if self.rank:
            return {}
        before = self.rounds_file.get(self.round - 1) if self.round else None
        first = before.next if before is not None else 0
        last = self.items.log.last
        return {
            "arrived": last.documents,
            "waiting_tokens": (self.layout.fresh(last.tokens) - first) * self.items.context,
        }

    def close(self) -> None:
        """Ends the thread and the reader; rounds() may not be called again."""
        if self.intake is not None:
            self.intake.close()
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
