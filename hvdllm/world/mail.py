"""What a single process and worlds of real ranks share: boxes of letters, and threads beside the loop."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import torch

from hvdllm import pulse
from hvdllm.device import start_thread
from hvdllm.errors import PeerError
from hvdllm.plain import Json
from hvdllm.world.base import Letter

PAUSE_S = 0.05  # between two looks at what else can end a wait


def too_long(waited_s: float, what: str) -> str:
    """The sentence of a rank that has waited too long for another one."""
    return (
        f"waited {waited_s:.0f} s (world.timeout_s) for {what}, so this rank gives up: another rank stands still or is "
        "out of reach, or its acts take longer than that"
    )


@contextlib.contextmanager
def at_most(limit_s: float, what: str) -> Iterator[None]:
    """A context that ends this process, with the sentence of `too_long`, if its body takes longer than the limit.

    It is for library calls that wait for the other ranks and cannot be made to give up.

    Args:
        limit_s: the limit in seconds.
        what: the body waits for.
    """

    def give_up() -> None:
        os.write(2, f"hvdllm: {too_long(limit_s, what)}\n".encode())
        os._exit(1)

    timer = threading.Timer(min(limit_s, threading.TIMEOUT_MAX), give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Threads:
    """The threads of a rank beside its loop.

    The first error of any thread is raised when the loop next waits for another rank, so the job ends with that error.
    Threads wait without limit, and the loop waits for `timeout_s` seconds.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._error: BaseException | None = None
        self._own: set[int] = set()

    def spawn(self, work: Callable[[], None], name: str) -> None:
        """Runs `work` in a thread of that name."""

        def run() -> None:
            self._own.add(threading.get_ident())
            try:
                work()
            except BaseException as error:
                self._error = self._error or error
            finally:
                self._own.discard(threading.get_ident())

        start_thread(run, name)

    def check(self, waited_s: float = 0.0, what: str = "") -> None:
        """Raises the error of a thread, if there is one, or PeerError if the loop has waited too long for `what`."""
        if self._error is not None:
            raise self._error
        if waited_s > self.timeout_s and threading.get_ident() not in self._own:
            raise PeerError(too_long(waited_s, what))


class Boxes:
    """The letters that have arrived at this rank, by box. Any thread may put or take letters."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._boxes: dict[str, deque[Letter]] = defaultdict(deque)
        self._changed = threading.Condition()

    def put(self, box: str, letter: Letter) -> None:
        with self._changed:
            self._boxes[box].append(letter)
            self._changed.notify_all()

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
        with pulse.waiting(f"a letter in `{box}`"):
            return self._take(box, meanwhile)

    def _take(self, box: str, meanwhile: Callable[[], None] | None) -> Letter:
        begin = time.monotonic()
        while True:
            with self._changed:
                if not self._boxes[box]:
                    self._changed.wait(PAUSE_S)
                if self._boxes[box]:
                    return self._boxes[box].popleft()
            self._threads.check(time.monotonic() - begin, f"a letter in `{box}`")
            if meanwhile is not None:
                meanwhile()


def copied(sender: int, head: Json, body: torch.Tensor | None) -> Letter:
    """The letter as it would arrive from another rank. It shares no memory with what the sender wrote."""
    return Letter(sender, json.loads(json.dumps(head)), None if body is None else body.detach().cpu().clone())


class OwnMail:
    """The mail of a rank that can write only to itself."""

    def __init__(self, threads: Threads, rank: int = 0) -> None:
        self.rank, self.boxes = rank, Boxes(threads)

    def post(self, to: int, box: str, head: Json, body: torch.Tensor | None = None) -> None:
        assert to == self.rank, f"there is no rank {to} here"
        self.boxes.put(box, copied(self.rank, head, body))

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
        return self.boxes.take(box, meanwhile)

    def close(self) -> None:
        pass
