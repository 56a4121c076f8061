"""Letters and threads beside the loop: what a single process and worlds of real ranks share."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

import torch

from hvdllm.device import start_thread
from hvdllm.errors import PeerError
from hvdllm.plain import Json
from hvdllm.world.base import Letter

PAUSE_S = 0.05  # between two looks at what else may end a wait


def too_long(waited_s: float, what: str) -> str:
    """The sentence of a rank that waited in vain; it is not the one that stands still."""
    return (
        f"waited {waited_s:.0f} s (world.timeout_s) for {what}, so this rank gives up: another rank stands still or is "
        "out of reach, or its acts take longer than that"
    )


@contextlib.contextmanager
def at_most(limit_s: float, what: str) -> Iterator[None]:
    """Ends this process, with the sentence above, where what stands within takes longer: a library's call that waits
    for the other ranks and cannot be asked to give up."""

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
    """This rank's threads beside its loop. The first error of any is raised wherever the loop waits for another rank,
    so the job ends with it. A thread waits without limit, the loop for `timeout_s`."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._error: BaseException | None = None
        self._own: set[int] = set()

    def spawn(self, work: Callable[[], None], name: str) -> None:
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
        """Raises what a thread has raised; PeerError where the loop has waited too long for `what`."""
        if self._error is not None:
            raise self._error
        if waited_s > self.timeout_s and threading.get_ident() not in self._own:
            raise PeerError(too_long(waited_s, what))


class Boxes:
    """What has arrived at this rank, box by box; any thread puts, any takes."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._boxes: dict[str, deque[Letter]] = defaultdict(deque)
        self._changed = threading.Condition()

    def put(self, box: str, letter: Letter) -> None:
        with self._changed:
            self._boxes[box].append(letter)
            self._changed.notify_all()

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
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
    """As it would arrive from elsewhere: nothing is shared with who wrote it."""
    return Letter(sender, json.loads(json.dumps(head)), None if body is None else body.detach().cpu().clone())


class OwnMail:
    """A rank that writes to itself."""

    def __init__(self, threads: Threads, rank: int = 0) -> None:
        self.rank, self.boxes = rank, Boxes(threads)

    def post(self, to: int, box: str, head: Json, body: torch.Tensor | None = None) -> None:
        assert to == self.rank, f"there is no rank {to} here"
        self.boxes.put(box, copied(self.rank, head, body))

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
        return self.boxes.take(box, meanwhile)

    def close(self) -> None:
        pass
