"""What worlds of real ranks share, whatever carries their bytes, and the arithmetic that is the same in every world.

Sums are taken in rank order, so they have the same bits in every world. 16-bit floats are added in fp32 and rounded
once.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from hvdllm.device import be_patient
from hvdllm.errors import PeerError, UserError
from hvdllm.world.base import Asks, Flight, Mail, first_problem
from hvdllm.world.driver import Driver
from hvdllm.world.mail import Threads

HALVES = (torch.float16, torch.bfloat16)
Where = tuple[int, int, int, int]  # rank, size, local rank, local size


# ------------------------------------------------------------------ arithmetic
def add(parts: Sequence[torch.Tensor], out: torch.Tensor) -> torch.Tensor:
    """Writes the sum of `parts`, in their order, to `out` and returns it.

    Args:
        parts: the tensors to be added.
        out: must not be one of them. At most one further tensor of this size is made.
    """
    if out.dtype in HALVES:
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return out.copy_(total)
    out.copy_(parts[0])
    for part in parts[1:]:
        out += part
    return out


def adasum(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """The Adasum (arXiv 2006.02924) of tensors, whose number is a power of two.

    Neighbours are joined in pairs, then the results in pairs, and so on. A pair a, b becomes
    (1 - a·b / 2|a|²) a + (1 - a·b / 2|b|²) b, with dot products and norms in fp64. As in Horovod, a coefficient is 1 if
    its norm is zero.
    """
    parts = list(parts)
    while len(parts) > 1:
        parts = [_pair(a, b) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _pair(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    x, y = a.double(), b.double()
    dot, nothing = (x * y).sum(), sys.float_info.min**0.5
    p, q = (torch.where(n >= nothing, 1 - dot / (2 * n), 1.0) for n in ((x * x).sum(), (y * y).sum()))
    return (p * x + q * y).to(a.dtype)


def must_be_power_of_two(size: int) -> None:
    """Raises UserError unless Adasum can join so many ranks."""
    if size & (size - 1):
        raise UserError(f"Adasum joins ranks in pairs and there are {size}: start a power of two, or reduce by sums")


# ------------------------------------------------------------------ bytes
def broadcast_sends(rank: int, root: int, size: int) -> int:
    """How often a rank sends all of x in Gloo's broadcast, which is a binomial tree from root (gloo/broadcast.cc)."""
    place, step, sends = (rank - root) % size, 1, 0
    while step < size:
        sends += place < step and place + step < size
        step *= 2
    return sends


# ------------------------------------------------------------------ parts of a world
def group_of(rank: int, groups: Sequence[tuple[int, ...]], size: int) -> tuple[int, ...]:
    """The group that holds `rank`, in ascending order.

    Raises RuntimeError if groups overlap, if they name ranks that do not exist, or if none holds `rank`.
    """
    named = [r for group in groups for r in group]
    if len(set(named)) < len(named) or not set(named) <= set(range(size)) or rank not in named:
        raise RuntimeError(f"{list(groups)} are no disjoint groups of {size} ranks, rank {rank} among them")
    return next(tuple(sorted(group)) for group in groups if rank in group)


class Drives(Protocol):
    """Runs flights of several stages, see world/driver.py."""

    def __call__(self, work: Callable[[], object]) -> Flight: ...

    def close(self) -> None: ...


class Ranks(ABC):
    """A world of ranks, or a part of one.

    Args:
        where: rank, size, and local rank and size among the ranks of this world on the same host.
        timeout_s: how long the loop waits for another rank.
        parent: of a part, the whole world, whose asks, driver, threads and count of bytes it shares.
        driver: runs flights of several stages, if not a thread of this rank.
    """

    def __init__(
        self, where: Where, timeout_s: float, parent: Ranks | None = None, driver: Drives | None = None
    ) -> None:
        self.rank, self.size, self.local_rank, self.local_size = where
        self.timeout_s, self.parent = timeout_s, parent
        be_patient(timeout_s)
        self.asks: Asks = parent.asks if parent else Asks()
        self.bytes_sent = 0.0
        self.no_cuda: str = parent.no_cuda if parent else ""
        self._counting = threading.Lock()  # the loop and the driver both send
        self._driver: Drives = parent._driver if parent else driver or Driver()
        self.threads: Threads = parent.threads if parent else Threads(timeout_s)

    @abstractmethod
    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Flight: ...

    def count(self, sent: float) -> None:
        """Counts bytes that this rank sends, also in the whole world if this is a part."""
        with self._counting:
            self.bytes_sent += sent
        if self.parent is not None:
            self.parent.count(sent)

    def drive(self, work: Callable[[], object]) -> Flight:
        return self._driver(work)

    def mail(self) -> Mail:
        raise UserError("these ranks know no letters, only collectives: start them with horovodrun --mpi or mpirun")

    def lost(self, error: Exception) -> PeerError | None:
        return None

    def spawn(self, work: Callable[[], None], name: str) -> None:
        self.threads.spawn(work, name)

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def texts(self, text: str, name: str) -> list[str]:
        own = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([own.numel()]), f"{name}.lengths", equal=True).land().tolist()
        parts = self.gather(own, f"{name}.bytes").land().split(lengths)
        return [bytes(part.tolist()).decode().rstrip("\0") for part in parts]

    def agree(self, problem: str | None, name: str) -> None:
        if said := first_problem(self.texts(problem or "", name)):
            raise UserError(said)

    def _local(self, members: Sequence[int], name: str) -> tuple[int, int]:
        """This rank's number among those of `members` on its host, and how many these are. Collective.

        Ranks are numbered host by host, so the first rank of a host identifies it.
        """
        first = self.gather(torch.tensor([self.rank - self.local_rank]), f"{name}.hosts", equal=True).land().tolist()
        near = [member for member in members if first[member] == first[self.rank]]
        return near.index(self.rank), len(near)
