"""Letters between real ranks, point to point over MPI, on a communicator of their own beside Horovod's.

Messages are two-sided. One thread of each rank sends letters and sorts those that arrive into boxes. One-sided windows
are no alternative: they make no progress while their target computes outside MPI, and Open MPI 4 has none over TCP for
several threads (the last section of hvdllm/exchange/README.md). The thread polls with sleeps of 0.1 to 2 ms and never
waits inside MPI, which would spin on a core.

A letter is its head as JSON bytes (tag 0) and its body as raw bytes (tag 1), in parts whose sizes fit into MPI's int.
Messages of one sender under one tag do not overtake each other. CUDA bodies travel through pinned host memory (which
the tests do not run on a GPU) and arrive on the CPU.

Horovod initialises MPI, with MPI_THREAD_MULTIPLE, and finalises it. This module is therefore imported after hvd.init,
and the communicator is freed before hvd.shutdown.
"""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from hvdllm import pulse
from hvdllm.errors import PeerError, UserError
from hvdllm.plain import Json
from hvdllm.world.base import Flight, Letter
from hvdllm.world.mail import Boxes, Threads, copied

try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    raise UserError(
        f"letters between ranks need mpi4py, which cannot be imported ({error}): run jobs/setup.sh, or take another "
        "exchange"
    ) from None

HEAD, BODY = 0, 1
PART = 2**28  # the most bytes of a message
SHORT_S, LONG_S = 1e-4, 2e-3


class MailWorld(Protocol):
    """What this mail needs of a world."""

    rank: int
    size: int
    threads: Threads

    def count(self, sent: float) -> None: ...

    def sum(self, x: torch.Tensor, name: str) -> Flight: ...


@dataclass
class Arriving:
    """A letter whose body may still be on its way."""

    box: str
    letter: Letter
    requests: list[MPI.Request] = field(default_factory=list)


def parts(body: torch.Tensor) -> list[Any]:
    """The bytes of a tensor in the parts and the form that MPI takes."""
    return [[part.numpy(), MPI.BYTE] for part in body.reshape(-1).view(torch.uint8).split(PART)]


def on_host(body: torch.Tensor) -> torch.Tensor:
    """A copy on the host, which MPI may read while `body` is written to again."""
    host = torch.empty(body.shape, dtype=body.dtype, pin_memory=body.is_cuda)
    return host.copy_(body.detach())


class MpiMail:
    """The mail of a world over MPI.

    Args:
        world: all ranks that mpirun started.

    Raises UserError if MPI sees other ranks than Horovod, or if it does not let several threads call it.
    """

    def __init__(self, world: MailWorld) -> None:
        if (MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()) != (world.rank, world.size):
            raise UserError(
                f"this is rank {world.rank} of {world.size}, and MPI sees rank {MPI.COMM_WORLD.Get_rank()} of "
                f"{MPI.COMM_WORLD.Get_size()}: letters need ranks that MPI started (horovodrun --mpi or mpirun)"
            )
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            raise UserError(
                "this MPI lets one thread call it at a time, letters beside Horovod need MPI_THREAD_MULTIPLE: take "
                "another build of MPI"
            )
        self.world, self.boxes = world, Boxes(world.threads)
        self._comm = MPI.COMM_WORLD.Dup()
        self._outgoing: deque[tuple[int, bytes, torch.Tensor | None]] = deque()
        self._leaving: list[tuple[list[MPI.Request], object]] = []  # requests, and the memory that they read
        self._arriving: dict[int, deque[Arriving]] = defaultdict(deque)  # by sender
        self._wake, self._closed, self._gone = threading.Event(), threading.Event(), threading.Event()
        self._drained = threading.Event()
        world.threads.spawn(self._run, "mail")

    def post(self, to: int, box: str, head: Json, body: torch.Tensor | None = None) -> None:
        if to == self.world.rank:
            self.boxes.put(box, copied(to, head, body))
            return
        kind = None if body is None else [str(body.dtype).removeprefix("torch."), body.numel()]
        frame = json.dumps([box, head, kind]).encode()
        self.world.count(len(frame) + (0 if body is None else body.nbytes))
        self._drained.clear()
        self._outgoing.append((to, frame, None if body is None else on_host(body)))
        self._wake.set()

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
        return self.boxes.take(box, meanwhile)

    def close(self) -> None:
        with pulse.waiting("its letters to arrive"):
            while self._outgoing or not self._drained.is_set():
                self.world.threads.check()
                time.sleep(SHORT_S)
        self.world.sum(torch.zeros(1), "mail.close").land()  # after this no letter of any rank is on its way
        self._closed.set()
        self._wake.set()
        self._gone.wait()
        self._comm.Free()

    # ------------------------------------------------------------------ the thread
    def _run(self) -> None:
        pause = SHORT_S
        try:
            while not self._closed.is_set():
                if self._send() | self._receive():
                    pause = SHORT_S
                    continue
                if not self._outgoing and not self._leaving:
                    self._drained.set()
                self._wake.wait(pause)
                self._wake.clear()
                pause = min(1.3 * pause, LONG_S)
        except MPI.Exception as error:
            raise PeerError(f"a letter failed, most likely because another rank is gone ({error})") from None
        finally:
            self._gone.set()

    def _send(self) -> bool:
        """Sends what waits. Returns whether there was anything to do."""
        before = len(self._leaving)
        while self._outgoing:
            to, frame, body = self._outgoing[0]
            requests = [self._comm.Isend([frame, MPI.BYTE], to, HEAD)]
            if body is not None:
                requests += [self._comm.Isend(part, to, BODY) for part in parts(body)]
            self._leaving.append((requests, (frame, body)))
            self._drained.clear()
            self._outgoing.popleft()
        new = len(self._leaving) > before
        self._leaving = [each for each in self._leaving if not MPI.Request.Testall(each[0])]
        return new

    def _receive(self) -> bool:
        """Puts what has arrived into its boxes. Returns whether there was anything to do."""
        new, status = False, MPI.Status()
        while self._comm.Iprobe(MPI.ANY_SOURCE, HEAD, status):
            sender, frame = status.Get_source(), bytearray(status.Get_count(MPI.BYTE))
            self._comm.Recv([frame, MPI.BYTE], sender, HEAD)
            box, head, kind = json.loads(frame)
            arriving = Arriving(box, Letter(sender, head))
            if kind is not None:
                body = torch.empty(kind[1], dtype=getattr(torch, kind[0]))
                arriving.letter.body = body
                arriving.requests = [self._comm.Irecv(part, sender, BODY) for part in parts(body)]
            self._arriving[sender].append(arriving)
            new = True
        for waiting in self._arriving.values():
            while waiting and MPI.Request.Testall(waiting[0].requests):
                arrived = waiting.popleft()
                self.boxes.put(arrived.box, arrived.letter)
                new = True
        return new
