"""The protocol of a world: some ranks, collectives matched by name, and what people ask of a run.

Invariant: every rank calls the same collectives under the same names. Names are fixed and few (Horovod
matches and caches by name), and a name is launched again only when its last use has landed.

channel   the first word of a name (`grad` of `grad.3.0`): its collectives are called in the same order on every
          rank, each channel by one thread at a time, for a world that matches by order (torch.distributed)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from hvdllm.errors import PeerError, UserError
from hvdllm.plain import Json


class Flight(Protocol):
    """One thing travelling."""

    def landed(self) -> bool:
        """Host poll, never blocks."""

    def land(self) -> Any:
        """Waits by poll and short sleeps, applies nothing. Raises PeerError when another rank is gone."""


@dataclass
class Asks:
    """What a person or a scheduler asks of a run; set by signals on any rank, taken along by the next meta."""

    stop: bool = False
    save: bool = False

    def take(self) -> Asks:
        """What was asked since the last call."""
        taken = Asks(self.stop, self.save)
        # Cleared one by one and only when seen, so that a signal between these lines is not lost.
        if taken.stop:
            self.stop = False
        if taken.save:
            self.save = False
        return taken


@dataclass
class Letter:
    """What one rank sends another, outside all collectives. head: plain JSON values."""

    sender: int
    head: Json
    body: torch.Tensor | None = None


class Mail(Protocol):
    """Letters between two ranks. box: what they are about (`log`, `push`, `weights`); few and fixed."""

    def post(self, to: int, box: str, head: Json, body: torch.Tensor | None = None) -> None:
        """Returns at once; `body` may be written to again. Letters of one sender arrive in the order they were sent."""

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
        """The next letter in this box; waits, calling `meanwhile` now and then. Its body is on the CPU and the taker's.
        Raises PeerError when the sender can only be gone."""

    def close(self) -> None:
        """No letter is on its way any more; every rank calls it."""


class World(Protocol):
    """`x` is a tensor on any device; `name` is matched over the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    asks: Asks
    bytes_sent: float  # by this rank since the start, counted by the ring formulas of each collective
    no_cuda: str  # why CUDA tensors cannot travel here, a clause; "": they can

    def sum(self, x: torch.Tensor, name: str) -> Flight:
        """In place: every rank's x becomes the sum over ranks, bit-equal on all. x must not be touched in flight."""

    def scatter(self, x: torch.Tensor, name: str) -> Flight:
        """Reduce-scatter: lands this rank's equal share of the sum over ranks; len(x) is a multiple of the size.

        The share may be a view of x, which must not be touched in flight and is spent afterwards.
        """

    def adasum(self, x: torch.Tensor, name: str) -> Flight:
        """In place: every rank's x becomes the Adasum of all (Maleki et al., 2020); a power of two ranks."""

    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Flight:
        """Every rank gets all x, joined along dimension 0 in rank order; only dimension 0 may differ. equal: it does
        not, and no word about sizes need travel before."""

    def alltoall(self, x: torch.Tensor, name: str) -> Flight:
        """x is cut along dimension 0 into one equal block a rank; lands the blocks meant for us, in rank order."""

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        """In place: every rank's x becomes root's."""

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> World:
        """A world of those ranks of the one group that holds this rank. Every rank passes the same disjoint groups.

        The part counts its bytes into ours as well. Collective.
        """

    def drive(self, work: Callable[[], object]) -> Flight:
        """A flight of several stages: `work` runs on this rank's one driver thread, in the order of the calls, and
        what it returns is what lands. It may wait for collectives, and drive stages of its own, which are walked at
        once; not for work that was driven after it."""

    def mail(self) -> Mail:
        """Letters between the ranks of this world; one at a time. Collective. Raises UserError where they have none."""

    def spawn(self, work: Callable[[], None], name: str) -> None:
        """A thread of this rank that runs `work` until it returns. What it raises is raised in the loop, where that
        waits for another rank."""

    def texts(self, text: str, name: str) -> list[str]:
        """Every rank's text, in rank order. Blocks."""

    def agree(self, problem: str | None, name: str) -> None:
        """Where any rank has a problem, every rank raises UserError with the first one's words. Blocks."""

    def lost(self, error: Exception) -> PeerError | None:
        """What to raise instead, where this is how the library underneath says that another rank is gone: flights see
        to it themselves, but a reference exchange's library raises wherever it waits."""

    def close(self) -> None:
        """Leaves in good order, when every rank does."""


def from_first(world: World, decide: Callable[[], object], name: str) -> Any:
    """What `decide` returns on rank 0, plain JSON values, on every rank. Collective. What it raises as UserError there
    is raised everywhere."""
    value, problem = None, None
    if world.rank == 0:
        try:
            value = decide()
        except UserError as error:
            problem = str(error)
    value, problem = json.loads(world.texts(json.dumps([value, problem]), name)[0])
    if problem is not None:
        raise UserError(problem)
    return value


@contextmanager
def peers(world: World) -> Iterator[None]:
    """Within, a peer that is gone is a PeerError, whichever library notices."""
    try:
        yield
    except RuntimeError as error:
        if (gone := world.lost(error)) is not None:
            raise gone from None
        raise


def first_problem(problems: list[str]) -> str | None:
    """The words for all ranks: the first rank's that has any, with its number where it is not the same on all."""
    rank = next((r for r, problem in enumerate(problems) if problem), None)
    if rank is None:
        return None
    return problems[rank] if len(set(problems)) == 1 else f"on rank {rank}: {problems[rank]}"
