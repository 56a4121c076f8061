"""The driver thread of a rank, which runs flights of several stages while the loop computes.

On CUDA the thread has a stream of its own. Its work begins after what the caller had queued, and what lands a flight is
queued after that work, so the host does not wait for the device. Not yet run on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from hvdllm import pulse
from hvdllm.device import pool, used_here

Arrived = tuple[object, torch.cuda.Event | None]  # what a flight lands, and the event after which it is complete


class Driven:
    """A flight of several stages."""

    def __init__(self, future: Future[Arrived]) -> None:
        self._future = future

    def landed(self) -> bool:
        if not self._future.done():
            return False
        if self._future.exception() is not None:
            return True  # `land` raises the error
        _, event = self._future.result()
        return event is None or bool(event.query())

    def land(self) -> Any:
        with pulse.waiting(pulse.DRIVEN):
            value, event = self._future.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
            used_here(value)
        return value


class Driver:
    """Runs work in the order of the calls. The thread is made at the first call, so many worlds never have one."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._stream: torch.cuda.Stream | None = None
        self._thread = 0

    def __call__(self, work: Callable[[], object]) -> Driven:
        if threading.get_ident() == self._thread:  # a stage of what is being driven: it runs at once, on its stream
            done: Future[Arrived] = Future()
            done.set_result((work(), None))
            return Driven(done)
        if self._pool is None:
            self._pool = pool("driver")
            if torch.cuda.is_available() and torch.cuda.is_initialized():
                self._stream = torch.cuda.Stream()
        ready = torch.cuda.current_stream().record_event() if self._stream is not None else None
        return Driven(self._pool.submit(self._run, work, ready))

    def _run(self, work: Callable[[], object], ready: torch.cuda.Event | None) -> Arrived:
        self._thread = threading.get_ident()
        pulse.driver()
        if self._stream is None:
            return work(), None
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            if ready is not None:
                self._stream.wait_event(ready)
            value = work()
            return value, self._stream.record_event()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
