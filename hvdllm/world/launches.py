"""The order in which a rank launches its collectives on a GPU, and the one thread that launches them.

A kernel of NCCL waits on the GPU for its peers. Where two ranks launch two of them in different orders, each may hold
its GPU while it waits for the other, for ever. The loop, its hooks and the driver all launch, at their own speed, so an
order by time differs between ranks. The order here is that of the program, as if driven work were walked where `drive`
is called: it is the same on every rank, and what works one after the other cannot wait for itself.

    place     of one launch of the loop or a hook, or of one call of `drive` with all that its work launches
    line      places, by their calls; the first one's launches go, and a driven place is left when its work is over

So a launch behind driven work waits for the last launch of that, and the threads that ask wait for nothing. On its GPU
every launch comes behind what the asking stream held when it asked. Not yet run on a GPU.
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
class Place:
    """launches: what is to be started, and who waits for it. open: may more come?"""

    open: bool
    launches: deque[tuple[Future[Any], Callable[[], Any]]] = field(default_factory=deque)


class Launches:
    """Makes its thread at the first launch, so that a world without GPUs has none."""

    def __init__(self) -> None:
        self._line: deque[Place] = deque()
        self._changed = threading.Condition()
        self._here = threading.local()
        self._begun = self._closed = False
        self._stream: torch.cuda.Stream | None = None

    def launch(self, start: Callable[[], T], device: torch.device) -> Future[T]:
        """What `start` returns, once it was called, behind what the current stream of `device` holds now."""
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

    def place(self) -> Place | None:
        """For work that is about to be driven; None on the driver's thread, where it belongs to what runs there."""
        if getattr(self._here, "place", None) is not None:
            return None
        place = Place(open=True)
        with self._changed:
            self._line.append(place)
        return place

    @contextmanager
    def at(self, place: Place) -> Iterator[None]:
        """Within, what this thread launches belongs there; afterwards nothing more does."""
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
        """What has not been launched never will be."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _enqueue(self, start: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        place = getattr(self._here, "place", None)
        with self._changed:
            if place is None:
                place = Place(open=False)
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
                future.set_exception(error)  # it is raised where the flight lands

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
