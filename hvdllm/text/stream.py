"""batch = f(seed, position): the samples of a run and their order are the same for any number of ranks.

window    context + 1 consecutive tokens; windows begin `context` tokens apart, so there are W = (tokens - 1) // context
epoch     every window once, in the order permutation(seed, epoch)
position  how many windows were taken: position k is window k % W in the order of epoch k // W
round     `batch` windows, from position round x batch on, dealt to the ranks as evenly as possible: each rank gets a
          consecutive share, and the first `batch % size` ranks get one window more
lane      what a rank walks where rounds have no fixed size: lane i of n has the windows at positions i, i + n, ...
group     ranks that train together, apart from other groups: it walks a lane in rounds of its share of `batch`
client    owner of whole documents (clients.py); the ranks that it is dealt to train on its text
batch     a micro-batch: at most `micro_batch` sequences of a rank's share, for one forward pass
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import TypeVar

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from hvdllm import device as devices
from hvdllm.errors import UserError
from hvdllm.plain import Json
from hvdllm.text.clients import Clients, frozen
from hvdllm.text.lanes import Lanes

T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """One micro-batch of one rank. A rank without a share gets an empty one, which has no tensors and runs no graph."""

    inputs: torch.Tensor | None  # int64 [sequences, context], on the device
    targets: torch.Tensor | None  # int64 [sequences, context]: inputs one token later
    tokens: int  # sequences x context: the targets that the loss counts
    last: bool  # closes this rank's share of the round
    round: int = 0  # as share() takes it; with `index` and the rank it seeds the dropout
    index: int = 0  # of this micro-batch in the rank's share


def deal(count: int, rank: int, size: int) -> tuple[int, int]:
    """(first, count): the consecutive share of one rank if `count` things are dealt to `size` ranks."""
    each, more = divmod(count, size)
    return rank * each + min(rank, more), each + (rank < more)


def permutation(windows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the windows in an epoch, int64 [windows]."""
    return frozen(np.random.SeedSequence([seed, epoch])).permutation(windows)


class Shuffled:
    """The windows of a text, in an order of their own in each epoch.

    Attributes: windows, a view [windows, context + 1] of which nothing is read yet.
    """

    def __init__(self, tokens: np.ndarray, context: int, seed: int) -> None:
        self.tokens, self.context, self.seed = tokens, context, seed
        self.windows = sliding_window_view(tokens, context + 1)[::context]
        # A round touches at most two epochs, since windows >= batch. Lanes may be a little apart.
        self._order = lru_cache(maxsize=3)(lambda epoch: permutation(count_windows(tokens, context), seed, epoch))

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """The windows at these positions in the order of the epochs, as rows of `windows`."""
        epochs, places = np.divmod(positions, count_windows(self.tokens, self.context))
        return np.concatenate([self._order(int(e))[places[epochs == e]] for e in np.unique(epochs)])


class Stream:
    """The micro-batches of one rank, read ahead by a thread of its own.

    rounds() moves the stream, share() does not, and state() is a few integers. `waited_s` is the time in seconds that
    the loop has waited for data. The first round is left out, because nothing could hide it.
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
        """Opens the stream at position 0.

        Args:
            tokens: the training text, unsigned [n].
            context: tokens in a sequence.
            batch: sequences in a round, over all ranks.
            micro_batch: the most sequences in one Batch.
            seed: of the order of windows.
            rank, size: this rank, and the number of ranks.
            device: where the tensors go.
            ahead: how many rounds are kept ready.
            end: the token between documents; None if the text is one document.

        Raises UserError if the text has fewer windows than one round takes.
        """
        self.windows = count_windows(tokens, context)
        if self.windows < batch:
            raise UserError(
                f"the training text has {self.windows} windows of model.context={context} tokens, fewer than the "
                f"{batch} that one batch takes: give more text, or lower batch_tokens or model.context"
            )
        self.batch, self.micro_batch = batch, micro_batch
        self.rank, self.size, self.end = rank, size, end
        self.device, self.ahead = device, ahead
        self.position = 0  # windows handed out to all ranks
        self.waited_s = 0.0
        self._federation: tuple[tuple[int, float | None], Federation] | None = None
        self._text = Shuffled(tokens, context, seed)
        self._pool: ThreadPoolExecutor | None = None
        self._lanes = Lanes()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def share(self, round: int, parts: int = 1) -> list[Batch]:
        """This rank's micro-batches of one round.

        With parts > 1 a round is cut into parts of `batch / parts` windows, and `round` counts parts. The function is
        pure: it gives any round, as often as asked, whatever rounds() has done.
        """
        return self._arrive(self._load(round, self._part(parts)), round)

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        """share(t, parts) for every t from the position on, without end.

        state() counts a round as soon as it is yielded: saved after the last micro-batch of round t, the stream resumes
        with round t + 1.

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
        """Micro-batches without end, for walker `index` among `of`. The caller sets `last`.

        A micro-batch has `micro_batch` windows, or as many as fit into `most` tokens if these are fewer, but at least
        one.

        There are as many lanes as there were walkers when the run began. If there are fewer walkers now, each has
        several lanes and takes the next micro-batch from the one that is least far on. Windows that were read ahead and
        not handed out do not count as taken.
        """
        each = max(1, min(self.micro_batch, most // (self._text.context)))
        for lane, at, loaded in self._walk(index, of, each, self._lanes.positions):
            (batch,) = self._arrive(loaded, at)
            batch.index = lane  # with the place in the lane it seeds the dropout
            yield batch

    def group(self, index: int, of: int, rank: int, size: int) -> GroupStream:
        """The rounds of group `index` among `of`, for rank `rank` of the `size` ranks in the group."""
        return GroupStream(self, index, of, rank, size)

    def clients(self, count: int, alpha: float | None) -> Federation:
        """The text dealt to `count` clients, as unevenly as `alpha` says (see Clients).

        It is dealt once, because that reads the whole text. Raises UserError if one of several clients would get all of
        the text.
        """
        if self._federation is None or self._federation[0] != (count, alpha):
            clients = Clients(self._text.tokens, self._text.context, self.end, count, alpha, self._text.seed)
            self._federation = (count, alpha), Federation(self, clients)
        return self._federation[1]

    def _walk(
        self, index: int, of: int, each: int, rows: Callable[[int, int, int], np.ndarray]
    ) -> Iterator[tuple[int, int, _Loaded]]:
        """(lane, place in it, what was loaded) for every `each` windows, without end.

        rows(lane, place, count) gives the positions of those that this rank loads.
        """
        mine = self._lanes.of_walker(index, of)
        planned = {lane: self._lanes.taken[lane] for lane in mine}

        def jobs() -> Iterator[tuple[tuple[int, int], Callable[[], _Loaded]]]:
            while True:
                lane = min(mine, key=lambda lane: (planned[lane], lane))
                at, planned[lane] = planned[lane], planned[lane] + each
                yield (lane, at), partial(self._rows, rows(lane, at, each))

        for (lane, at), loaded in self._read_ahead(jobs()):
            self._lanes.taken[lane] = at + each
            yield lane, at, loaded

    def _read_ahead(self, jobs: Iterator[tuple[T, Callable[[], _Loaded]]]) -> Iterator[tuple[T, _Loaded]]:
        """The name of each job and what it has loaded, in order. Some jobs are always under way in the thread."""
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

    def lanes(self) -> Json:
        """How far this rank has walked its lanes; {} without lanes."""
        return self._lanes.state()

    def state(self) -> dict[str, int]:
        """Where the stream stands: how many rounds were handed out, and the same place as epoch and window."""
        epoch, window = divmod(self.position, self.windows)
        return {"round": self.position // self.batch, "epoch": epoch, "window": window, "windows": self.windows}

    def load(self, state: dict[str, int], lanes: Sequence[Json] = ()) -> None:
        """Goes to the place that state() and the lanes() of all ranks described, for any number of ranks.

        Ends what is under way.

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
        self._lanes.load(lanes)

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
        return self._copy(self._text.rows(positions))

    def _copy(self, rows: np.ndarray) -> _Loaded:
        """These windows of the text, copied or on their way to the device. Runs in the thread."""
        if not len(rows):
            return None
        inputs, targets = _pair(self._text.windows, rows)
        if self._copies is None:
            return inputs, targets, None
        with torch.cuda.stream(self._copies):
            # The allocator does not give pinned memory away again before the copy out of it has run.
            on_device = [x.pin_memory().to(self.device, non_blocking=True) for x in (inputs, targets)]
            return *on_device, self._copies.record_event()

    def _arrive(self, loaded: _Loaded, round: int) -> list[Batch]:
        """The micro-batches of a share, as views of one pair of tensors. Runs in the loop's thread."""
        if loaded is None:
            return [Batch(None, None, 0, last=True, round=round)]
        inputs, targets, copied = loaded
        if copied is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(copied)  # the device waits, the host does not
            # The memory belongs to the side stream, which must not reuse it while we read.
            inputs.record_stream(here)
            targets.record_stream(here)
        pairs = list(zip(inputs.split(self.micro_batch), targets.split(self.micro_batch), strict=True))
        return [Batch(x, y, x.numel(), i == len(pairs) - 1, round, i) for i, (x, y) in enumerate(pairs)]


class GroupStream:
    """The micro-batches of one rank if groups of ranks train apart; see Stream.group.

    The number of a round is the position of its first window, so that share() is pure.
    """

    def __init__(self, stream: Stream, index: int, of: int, rank: int, size: int) -> None:
        self.stream, self.index, self.of, self.rank, self.size = stream, index, of, rank, size
        self.windows = deal(stream.batch, index, of)[1]  # that all ranks of the group take in a round

    def rounds(self, parts: int = 1) -> Iterator[list[Batch]]:
        if parts != 1:
            raise ValueError(f"a group's rounds are not cut into {parts} parts")
        for lane, at, loaded in self.stream._walk(self.index, self.of, self.windows, self._own):
            yield self.stream._arrive(loaded, self._number(lane, at))

    def share(self, number: int, parts: int = 1) -> list[Batch]:
        at, lane = divmod(number, len(self.stream._lanes.taken))
        return self.stream._arrive(self.stream._rows(self._own(lane, at, self.windows)), number)

    def _number(self, lane: int, at: int) -> int:
        return lane + len(self.stream._lanes.taken) * at

    def _own(self, lane: int, at: int, count: int) -> np.ndarray:
        first, own = deal(count, self.rank, self.size)
        return self.stream._lanes.positions(lane, at + first, own)


class Federation:
    """A text that was dealt to clients; see Stream.clients."""

    def __init__(self, stream: Stream, clients: Clients) -> None:
        self.stream, self.clients, self.tokens = stream, clients, clients.tokens

    def sample(self, round: int, count: int | None) -> list[int]:
        return self.clients.sample(round, count)

    def walk(self, plan: Iterator[tuple[int, int]], of: int, rank: int, size: int) -> Turns:
        return Turns(self, plan, self.stream.batch // of, rank, size)


class Turns:
    """The micro-batches of one rank if clients are trained one after the other.

    Args:
        federation: the clients and their text.
        plan: for each round the client, and which of its steps this is.
        windows: in a step of a client.
        rank, size: this rank among those that share the clients' steps.

    The number of a round holds the number of the step and the client, so that share() is pure.
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


# Inputs, targets and, on CUDA, the event after their copies. None if this rank has no share.
_Loaded = tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None] | None


def count_windows(tokens: np.ndarray, context: int) -> int:
    """How many windows of context + 1 tokens a text has."""
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
    """This rank's (inputs, targets) of an evaluation, int64 [sequences, context] on the device.

    These are always the same windows, the first `eval_tokens` tokens of the validation text in their order, dealt to
    the ranks like a batch. eval_tokens is rounded down to whole windows, but to no less than one; 0 means all. A rank
    may get none.

    Raises UserError, at the call, if the text has not a single window.
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
    """The inputs and the targets of these windows, each contiguous int64 [rows, context]."""
    picked = windows[rows].astype(np.int64)
    return tuple(torch.from_numpy(np.ascontiguousarray(x)) for x in (picked[:, :-1], picked[:, 1:]))  # type: ignore[return-value]
