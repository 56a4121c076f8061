"""batch = f(seed, position): the samples of a run and their order are the same for any number of ranks.

window    context + 1 consecutive tokens, at stride context; W = (tokens - 1) // context of them
epoch     every window once, in the order permutation(seed, epoch)
position  how many windows were taken: position k is window k % W of the order of epoch k // W
round     `batch` windows, position round x batch and on, dealt to the ranks as evenly as it goes:
          each rank a consecutive share, the first `batch % size` ranks one window more
lane      what one rank walks where rounds have no fixed size: lane i of n takes the windows at positions i, i + n, ...
group     ranks that train on their own together: it walks a lane in rounds, its share of `batch`, dealt to its ranks
client    owner of whole documents, trained on by whichever ranks it is dealt to (clients.py)
batch     (a micro-batch) at most `micro_batch` sequences of a rank's share: one forward pass
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from hvdllm import device as devices
from hvdllm.errors import UserError
from hvdllm.text.clients import Clients, frozen

T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """One micro-batch of one rank. An empty one (a rank without a share) has no tensors and runs no graph."""

    inputs: torch.Tensor | None  # int64 [sequences, context], on the device
    targets: torch.Tensor | None  # int64 [sequences, context]: inputs one token later
    tokens: int  # sequences x context: the targets counted in the loss
    last: bool  # closes this rank's share of the round
    round: int = 0  # that share() takes: with `index` and the rank the place that dropout is seeded by
    index: int = 0  # number of this micro-batch in the rank's share


def deal(count: int, rank: int, size: int) -> tuple[int, int]:
    """(first, count) of one rank's consecutive share when `count` things are dealt to `size` ranks."""
    each, more = divmod(count, size)
    return rank * each + min(rank, more), each + (rank < more)


def permutation(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows in an epoch, int64 [windows]."""
    return frozen(np.random.SeedSequence([seed, epoch])).permutation(windows)


class Stream:
    """One rank's micro-batches, read ahead by a thread of its own.

    rounds() moves the stream and share() does not; state() is a few integers. `waited_s` says for how long
    the loop stood waiting for data, in seconds, the first round (which nothing could hide) left out.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        *,
        context: int,
        batch: int,
        micro_batch: int,
        seed: int,
        rank: int,
        size: int,
        device: torch.device,
        ahead: int = 2,
        end: int | None = None,
    ) -> None:
        """tokens: unsigned [n]; context: tokens a sequence has; batch: sequences a round has, over all ranks;
        micro_batch: sequences at most in one Batch; ahead: rounds kept ready; end: the token between documents.

        Raises UserError where the text has fewer windows than one round takes.
        """
        self.windows = count_windows(tokens, context)
        if self.windows < batch:
            raise UserError(
                f"the training text has {self.windows} windows of model.context={context} tokens, fewer than the "
                f"{batch} that one batch takes: give more text, or lower batch_tokens or model.context"
            )
        self.batch, self.micro_batch = batch, micro_batch
        self.rank, self.size, self.seed, self.end = rank, size, seed, end
        self.device, self.ahead = device, ahead
        self.position = 0  # windows handed out to all ranks
        self.waited_s = 0.0
        self._tokens = tokens
        self._federation: tuple[tuple[int, float | None], Federation] | None = None
        self._windows = sliding_window_view(tokens, context + 1)[::context]  # a view: nothing is read yet
        # A round touches at most two epochs, for windows >= batch; lanes may be a little apart.
        self._order = lru_cache(maxsize=3)(lambda epoch: permutation(self.windows, seed, epoch))
        self._pool: ThreadPoolExecutor | None = None
        self._lanes: dict[int, int] = {}  # lane: windows handed out of it
        self._rest: list[int] = []  # positions that come first, dealt to the lanes in turn; behind them the lanes
        self._from = 0  # begin, each at this place of its own
        self._walked: list[int] = []
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def share(self, round: int, parts: int = 1) -> list[Batch]:
        """This rank's micro-batches of one round (of one part of `batch / parts` windows, where parts > 1:
        round then counts parts). Pure: any round, as often as asked, whatever rounds() has done."""
        return self._arrive(self._load(round, self._part(parts)), round)

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        """share(t, parts) of every t from the position on, without end. state() counts a round from its yield
        on: saved after the last micro-batch of round t, it resumes with round t + 1.

        Raises what the thread raised, at the round that it could not make.
        """
        part = self._part(parts)
        if self.position % part:
            raise ValueError(f"position {self.position} is inside a part of {part} windows")
        self.close()
        pool = self._pool = devices.pool("stream")
        first = self.position // part
        ready: deque[Future[_Loaded]] = deque(
            pool.submit(self._load, first + k, part) for k in range(max(1, self.ahead))
        )
        try:
            while True:
                since = time.perf_counter()
                loaded = ready.popleft().result()
                if self.position > first * part:
                    self.waited_s += time.perf_counter() - since
                self.position += part
                ready.append(pool.submit(self._load, self.position // part + len(ready), part))
                yield self._arrive(loaded, self.position // part - 1)
        finally:
            pool.shutdown(cancel_futures=True)

    def lane(self, index: int, of: int, most: int) -> Iterator[Batch]:
        """Micro-batches without end, of walker `index` among `of`; `last` is left to the caller. most: tokens that one
        should have at most; it has `micro_batch` windows where these are fewer, and at least one.

        The lanes are as many as the walkers were when the run began; a walker of fewer takes, each time, whichever of
        its lanes is least far on. What was read ahead and not handed out does not count.
        """
        each = max(1, min(self.micro_batch, most // (self._windows.shape[1] - 1)))
        for lane, at, loaded in self._walk(index, of, each, self._places):
            (batch,) = self._arrive(loaded, at)
            batch.index = lane  # with its place in the lane: what dropout is seeded by
            yield batch

    def group(self, index: int, of: int, rank: int, size: int) -> Group:
        """The rounds of group `index` among `of`, as rank `rank` of the group's `size` has them."""
        return Group(self, index, of, rank, size)

    def clients(self, count: int, alpha: float | None) -> Federation:
        """The text dealt to so many clients; alpha: how unevenly, see Clients. Raises UserError where all of it falls
        to one of several. Dealt once: it reads the whole text."""
        if self._federation is None or self._federation[0] != (count, alpha):
            clients = Clients(self._tokens, self._windows.shape[1] - 1, self.end, count, alpha, self.seed)
            self._federation = (count, alpha), Federation(self, clients)
        return self._federation[1]

    def _walk(
        self, index: int, of: int, each: int, rows: Callable[[int, int, int], np.ndarray]
    ) -> Iterator[tuple[int, int, _Loaded]]:
        """(lane, windows handed out of it before, what was loaded) of every `each` windows, without end. rows: which
        positions this rank loads of them, given lane, place and count."""
        if len(self._lanes) < of:
            self._add_lanes(of)
        mine = [lane for lane in self._lanes if lane % of == index]
        planned = {lane: self._lanes[lane] for lane in mine}
        self._walked = mine

        def jobs() -> Iterator[tuple[tuple[int, int], Callable[[], _Loaded]]]:
            while True:
                lane = min(mine, key=lambda lane: (planned[lane], lane))
                at, planned[lane] = planned[lane], planned[lane] + each
                yield (lane, at), partial(self._rows, rows(lane, at, each))

        for (lane, at), loaded in self._read_ahead(jobs()):
            self._lanes[lane] = at + each
            yield lane, at, loaded

    def _read_ahead(self, jobs: Iterator[tuple[T, Callable[[], _Loaded]]]) -> Iterator[tuple[T, _Loaded]]:
        """What each job loads, in order, beside what it is called; some are under way in the thread."""
        self.close()
        pool = self._pool = devices.pool("stream")
        ready = deque((called, pool.submit(job)) for called, job in islice(jobs, max(1, 2 * self.ahead)))
        first = True
        try:
            while ready:
                called, loading = ready.popleft()
                since = time.perf_counter()
                loaded = loading.result()
                self.waited_s += 0.0 if first else time.perf_counter() - since
                first = False
                ready.extend((called, pool.submit(job)) for called, job in islice(jobs, 1))
                yield called, loaded
        finally:
            pool.shutdown(cancel_futures=True)

    def _add_lanes(self, of: int) -> None:
        """At the start, or where there are more walkers than there were: so many lanes. What the old ones have left
        below the furthest of them comes first, so that no window is skipped and none is read twice."""
        old, top = self._lanes, 0
        if old:
            top = 1 + max((self._place(lane, at - 1) for lane, at in old.items() if at), default=-1)
        rest = [place for lane, at in old.items() for place in self._left(lane, at, top)]
        self._rest, self._from = sorted(rest), -(-top // of)
        self._rest += range(top, of * self._from)
        self._lanes = dict.fromkeys(range(of), 0)

    def _left(self, lane: int, at: int, top: int) -> Iterator[int]:
        """Positions of a lane, from its place `at` on, below `top`."""
        while (place := self._place(lane, at)) < top:
            yield place
            at += 1

    def _place(self, lane: int, at: int) -> int:
        """Position in the epochs' order of window `at` of a lane."""
        of = len(self._lanes)
        first = len(range(lane, len(self._rest), of))  # of the rest
        return self._rest[lane + of * at] if at < first else lane + of * (self._from + at - first)

    def _places(self, lane: int, at: int, count: int) -> np.ndarray:
        return np.array([self._place(lane, k) for k in range(at, at + count)], dtype=np.int64)

    def lanes(self) -> dict[str, Any]:
        """How many lanes there are, where they began, and how far on those are that this rank walks; {} where it walks
        none."""
        if not self._lanes:
            return {}
        begun = {"rest": self._rest, "from": self._from} if self._from or self._rest else {}
        return {"of": len(self._lanes), "at": {str(k): self._lanes[k] for k in self._walked}, **begun}

    def state(self) -> dict[str, int]:
        """Where the stream stands: rounds handed out, and the same place as epoch and window (of so many) in it."""
        epoch, window = divmod(self.position, self.windows)
        return {"round": self.position // self.batch, "epoch": epoch, "window": window, "windows": self.windows}

    def load(self, state: dict[str, int], lanes: Sequence[dict[str, Any]] = ()) -> None:
        """Goes to the place that state(), and lanes() of all ranks, named, for any world size. Ends what is under way.

        Raises UserError where the place does not exist with this text and this batch.
        """
        position = state["epoch"] * self.windows + state["window"]
        if state["windows"] != self.windows or state["round"] != position // self.batch:
            raise UserError(
                f"the checkpoint stands at round {state['round']} of a text of {state['windows']} windows, not of one "
                f"of {self.windows} at {self.batch} a batch: resume with the text and batch it was made with"
            )
        self.close()
        self.position = position
        known = {int(lane): at for each in lanes if each for lane, at in each["at"].items()}
        self._lanes = dict(sorted(known.items()))
        begun = next((each for each in lanes if "from" in each), {})
        self._rest, self._from = list(begun.get("rest", [])), int(begun.get("from", 0))

    def close(self) -> None:
        """Ends the thread; rounds() may be called again."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _part(self, parts: int) -> int:
        if self.batch % parts:
            raise ValueError(f"a batch of {self.batch} windows has no {parts} equal parts")
        return self.batch // parts

    def _load(self, number: int, part: int) -> _Loaded:
        """This rank's share of part `number`, copied or on its way to the device. Runs in the thread."""
        first, count = deal(part, self.rank, self.size)
        if count == 0:
            return None
        return self._rows(np.arange(count) + number * part + first)

    def _rows(self, positions: np.ndarray) -> _Loaded:
        """The windows at these positions, copied or on their way to the device. Runs in the thread."""
        if not len(positions):
            return None
        epochs, places = np.divmod(positions, self.windows)
        rows = np.concatenate([self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)])
        return self._copy(rows)

    def _copy(self, rows: np.ndarray) -> _Loaded:
        """These windows of the text, copied or on their way to the device. Runs in the thread."""
        if not len(rows):
            return None
        inputs, targets = _pair(self._windows, rows)
        if self._copies is None:
            return inputs, targets, None
        with torch.cuda.stream(self._copies):
            # Pinned memory is not given away again before the copy out of it has run: the allocator sees to it.
            on_device = [x.pin_memory().to(self.device, non_blocking=True) for x in (inputs, targets)]
            return *on_device, self._copies.record_event()

    def _arrive(self, loaded: _Loaded, round: int) -> list[Batch]:
        """The micro-batches of a share, as views of its one pair of tensors. Runs in the loop's thread."""
        if loaded is None:
            return [Batch(None, None, 0, last=True, round=round)]
        inputs, targets, copied = loaded
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)  # the device waits, the host does not
            inputs.record_stream(here)  # the memory came from the side stream: not to be reused under our feet
            targets.record_stream(here)
        pairs = list(zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True))
        return [Batch(x, y, x.numel(), i == len(pairs) - 1, round, i) for i, (x, y) in enumerate(pairs)]


class Group:
    """One rank's micro-batches where groups of ranks train on their own; see Stream.group.

    A round's number is the position of its first window, so that share() is pure.
    """

    def __init__(self, stream: Stream, index: int, of: int, rank: int, size: int) -> None:
        self.stream, self.index, self.of, self.rank, self.size = stream, index, of, rank, size
        self.windows = deal(stream.batch, index, of)[1]  # of all the group's ranks a round

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        if parts != 1:
            raise ValueError(f"a group's rounds are not cut into {parts} parts")
        for lane, at, loaded in self.stream._walk(self.index, self.of, self.windows, self._own):
            yield self.stream._arrive(loaded, self._number(lane, at))

    def share(self, number: int, parts: int = 1) -> list[Batch]:
        at, lane = divmod(number, len(self.stream._lanes))
        return self.stream._arrive(self.stream._rows(self._own(lane, at, self.windows)), number)

    def _number(self, lane: int, at: int) -> int:
        return lane + len(self.stream._lanes) * at

    def _own(self, lane: int, at: int, count: int) -> np.ndarray:
        first, own = deal(count, self.rank, self.size)
        return self.stream._places(lane, at + first, own)


class Federation:
    """The text dealt to clients; see Stream.clients."""

    def __init__(self, stream: Stream, clients: Clients) -> None:
        self.stream, self.clients, self.tokens = stream, clients, clients.tokens

    def sample(self, round: int, count: int | None) -> list[int]:
        return self.clients.sample(round, count)

    def walk(self, plan: Iterator[tuple[int, int]], of: int, rank: int, size: int) -> Turns:
        return Turns(self, plan, self.stream.batch // of, rank, size)


class Turns:
    """One rank's micro-batches where clients are trained one after the other, as rank `rank` of `size` that share
    them. plan: client and number of its step, of each round; windows: of a client's step.

    A round's number is that of the step, then the client's, so that share() is pure.
    """

    def __init__(self, federation: Federation, plan: Iterator[tuple[int, int]], windows: int, rank: int, size: int):
        self.federation, self.plan, self.windows, self.rank, self.size = federation, plan, windows, rank, size

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        if parts != 1:
            raise ValueError(f"a client's rounds are not cut into {parts} parts")
        stream, of = self.federation.stream, len(self.federation.tokens)
        numbers = (step * of + client for client, step in self.plan)
        for number, loaded in stream._read_ahead((number, partial(self._load, number)) for number in numbers):
            yield stream._arrive(loaded, number)

    def share(self, number: int, parts: int = 1) -> list[Batch]:
        return self.federation.stream._arrive(self._load(number), number)

    def _load(self, number: int) -> _Loaded:
        step, client = divmod(number, len(self.federation.tokens))
        first, own = deal(self.windows, self.rank, self.size)
        positions = step * self.windows + first + np.arange(own)
        return self.federation.stream._copy(self.federation.clients.windows(client, positions))


# inputs, targets and, on CUDA, the event after their copies; None: this rank has no share.
_Loaded = tuple[torch.Tensor, torch.Tensor, Any] | None


def count_windows(tokens: np.ndarray, context: int) -> int:
    return max(0, (len(tokens) - 1) // context)


def validation(
    tokens: np.ndarray,
    *,
    context: int,
    eval_tokens: int,
    micro_batch: int,
    rank: int,
    size: int,
    device: torch.device,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's (inputs, targets), int64 [sequences, context] on the device, of the first eval_tokens of
    the validation text: always the same windows, in their order in the text, dealt to the ranks like a batch.

    eval_tokens is rounded down to whole windows, at least one; 0: all. A rank may get none.
    Raises UserError, at the call, where the text has not one window.
    """
    windows = count_windows(tokens, context)
    if windows == 0:
        raise UserError(
            f"the validation text has {len(tokens)} tokens, less than one window of model.context={context} and 1: "
            "set text.validation, raise text.validation_share, or switch evaluation off with eval_every=0"
        )
    if eval_tokens:
        windows = min(windows, max(1, eval_tokens // context))
    first, count = deal(windows, rank, size)
    view = sliding_window_view(tokens, context + 1)[::context]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for at in range(first, first + count, micro_batch):
            inputs, targets = _pair(view, np.arange(at, min(at + micro_batch, first + count)))
            yield inputs.to(device), targets.to(device)

    return batches()


def _pair(windows: np.ndarray, rows: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets, each contiguous int64 [rows, context], of some windows."""
    picked = windows[rows].astype(np.int64)
    return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in (picked[:, :-1], picked[:, 1:]))  # type: ignore[return-value]
