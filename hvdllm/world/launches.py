"""The order in which a rank launches its collectives on a GPU, and the thread that launches them.

An NCCL kernel waits on the GPU for its peers. If two ranks launched two such kernels in different orders, each could
occupy its GPU while it waits for the other, for ever. The loop, its hooks and the driver all launch collectives at
their own speed, so an order by time would differ between ranks. The order here is that of the program, as if driven
work ran where `drive` is called. It is the same on every rank, and no launch can wait for a later one.

    place     a place in that order: one launch of the loop or a hook, or one call of `drive` with all its launches
    line      the places in the order of their calls; launches of the first place are made, and the place of a call of
              `drive` is left when its work has ended

A launch after driven work therefore waits for the last launch of that work. The threads that ask for launches do not
wait. On the GPU each launch comes after what the asking stream held at that time. Not yet run on a GPU.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from hvdllm.device import start_thread

T = TypeVar("T")


@dataclass
class Seat:
    """A place in the order of launches.

    Attributes:
        open: whether more launches may come here.
        launches: what is to be called, and the futures of the results.
    """

    open: bool
    launches: deque[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=deque)


class Launches:
    """The line of launches. Its thread is made at the first launch, so a world without GPUs has none."""

    def __init__(self) -> None:
        self._line: deque[Seat] = deque()
        self._changed = threading.Condition()
        self._here = threading.local()
        self._begun = self._closed = False
        self._stream: torch.cuda.Stream | None = None

    def launch(self, start: Callable[[], T], device: torch.device) -> Future[T]:
        """Queues a launch.

        Args:
            start: launches the collective.
            device: on CUDA, the launch comes after what the current stream of this device holds now.

        Returns a future of what `start` returns.
        """
        if device.type != "cuda":
            return self._enqueue(start)
        ready = torch.cuda.current_stream(device).record_event()

        def behind() -> T:
            if self._stream is None:
                self._stream = torch.cuda.Stream(device)
            with torch.cuda.stream(self._stream):
                self._stream.wait_event(ready)
                return start()

        return self._enqueue(behind)

    def place(self) -> Seat | None:
        """A place for work that is about to be driven. It is None on the driver's thread, where launches belong to the
        place of the work that runs."""
        if getattr(self._here, "place", None) is not None:
            return None
        place = Seat(open=True)
        with self._changed:
            self._line.append(place)
        return place

    @contextmanager
    def at(self, place: Seat) -> Iterator[None]:
        """A context in which the launches of this thread belong to `place`. Afterwards the place is closed."""
        self._here.place = place
        try:
            yield
        finally:
            self._here.place = None
            with self._changed:
                place.open = False
                if not place.launches:
                    self._line.remove(place)
                self._changed.notify()

    def close(self) -> None:
        """Ends the thread. What has not been launched is dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _enqueue(self, start: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        place = getattr(self._here, "place", None)
        with self._changed:
            if place is None:
                place = Seat(open=False)
                self._line.append(place)
            place.launches.append((future, start))
            self._changed.notify()
        if not self._begun:
            self._begun = True
            start_thread(self._run, "launches")
        return future

    def _run(self) -> None:
        while (job := self._next()) is not None:
            future, start = job
            try:
                future.set_result(start())
            except BaseException as error:
                future.set_exception(error)  # raised when the flight lands

    def _next(self) -> tuple[Future[Any], Callable[[], Any]] | None:
        with self._changed:
            while not self._closed:
                if self._line and self._line[0].launches:
                    return self._line[0].launches.popleft()
                if self._line and not self._line[0].open:
                    self._line.popleft()
                else:
                    self._changed.wait()
        return None
