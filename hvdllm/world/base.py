"""The protocol of a world: ranks, collectives that are matched by name, and requests to stop or save.

Invariant: every rank calls the same collectives under the same names. Names are fixed and few, since Horovod matches
and caches by name. A name is launched again only after its last use has landed.

The first word of a name is its channel (`grad` of `grad.3.0`). The collectives of a channel are called in the same
order on every rank, by one thread at a time, because torch.distributed matches collectives by order.
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
    """A collective, or driven work, that has been launched and may not be complete."""

    def landed(self) -> bool:
        """Whether it is complete. The host polls, and never blocks."""

    def land(self) -> Any:
        """Waits until it is complete, by polls and short sleeps, and returns the result.

        Raises PeerError if another rank is gone.
        """


@dataclass
class Asks:
    """What a user or a scheduler asks of a run. Signals set it on any rank, and the next meta tells all ranks."""

    stop: bool = False
    save: bool = False

    def take(self) -> Asks:
        """What was asked since the last call."""
        taken = Asks(self.stop, self.save)
        # A flag is cleared only if it was seen, so that a signal between these lines is not lost.
        if taken.stop:
            self.stop = False
        if taken.save:
            self.save = False
        return taken


@dataclass
class Letter:
    """A message from one rank to another, outside all collectives.

    Attributes:
        sender: the rank that sent it.
        head: plain JSON values.
        body: a tensor, if there is one.
    """

    sender: int
    head: Json
    body: torch.Tensor | None = None


class Mail(Protocol):
    """Letters from rank to rank. They are sorted into boxes by what they are about: `log`, `push`, `weights`. The names
    of boxes are few and fixed."""

    def post(self, to: int, box: str, head: Json, body: torch.Tensor | None = None) -> None:
        """Sends a letter and returns at once; `body` may be written to again.

        Letters of one sender arrive in the order in which they were sent.
        """

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
        """Waits for the next letter in this box and takes it. Its body lies on the CPU and belongs to the caller.

        Args:
            box: its name.
            meanwhile: is called now and then while this waits.

        Raises PeerError if no letter can come any more, because other ranks are gone.
        """

    def close(self) -> None:
        """Waits until no letter of any rank is on its way, and ends the mail. Collective."""


class World(Protocol):
    """The ranks that train together, as one of them sees them.

    In all collectives `x` is a tensor on any device, and `name` is the same on all ranks.

    Attributes:
        rank, size: the number of this rank, and how many ranks there are.
        local_rank, local_size: the same among the ranks on this host.
        asks: what was asked of this rank.
        bytes_sent: bytes that this rank has sent, counted by the formulas of each collective.
        no_cuda: why CUDA tensors cannot travel here, as a clause; "" if they can.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    asks: Asks
    bytes_sent: float
    no_cuda: str

    def sum(self, x: torch.Tensor, name: str) -> Flight:
        """All-reduce in place: x becomes the sum over ranks, bit-equal on all. x must not be touched in flight."""

    def scatter(self, x: torch.Tensor, name: str) -> Flight:
        """Reduce-scatter: lands this rank's equal share of the sum over ranks; len(x) is a multiple of the size.

        The share may be a view of x. x must not be touched in flight, and its values are lost afterwards.
        """

    def adasum(self, x: torch.Tensor, name: str) -> Flight:
        """In place: x becomes the Adasum of all ranks' x (Maleki et al., 2020). Needs a power of two of ranks."""

    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Flight:
        """All-gather: lands the x of all ranks, joined along dimension 0 in rank order.

        Args:
            x: its shapes may differ between ranks in dimension 0 alone.
            name: of the collective.
            equal: all shapes are equal, so sizes need not be exchanged first.
        """

    def alltoall(self, x: torch.Tensor, name: str) -> Flight:
        """All-to-all: x is cut along dimension 0 into one equal block for each rank. Lands the blocks that all ranks
        have for this one, in rank order."""

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        """In place: x becomes that of rank `root`."""

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> World:
        """The part of this world whose ranks are those of the group that holds this rank. Collective.

        Every rank passes the same disjoint groups. Bytes that are sent in the part count in this world, too.
        """

    def drive(self, work: Callable[[], object]) -> Flight:
        """Launches a flight of several stages, such as a collective whose result is sent in another one.

        This rank has one driver thread, which runs what it is given in the order of the calls.

        Args:
            work: runs on the driver thread, and what it returns lands. It may wait for collectives, but not for work
              that is driven after it. What it drives itself runs at once.
        """

    def mail(self) -> Mail:
        """Opens the mail between the ranks of this world, of which there is one at a time. Collective.

        Raises UserError if these ranks cannot send letters.
        """

    def spawn(self, work: Callable[[], None], name: str) -> None:
        """Runs `work` in a thread of this rank until it returns.

        An error in the thread is raised in the loop, when the loop next waits for another rank.
        """

    def rest(self, seconds: float) -> None:
        """Waits, where no other rank can say when there is something to do again. Logical ranks run meanwhile."""

    def texts(self, text: str, name: str) -> list[str]:
        """Every rank's text, in rank order. Blocks."""

    def agree(self, problem: str | None, name: str) -> None:
        """Raises UserError on every rank, with the problem of the first rank that has one, if any has. Blocks."""

    def lost(self, error: Exception) -> PeerError | None:
        """The PeerError to raise instead of `error`, or None if the error does not mean that another rank is gone.

        Flights translate such errors themselves. This is for reference exchanges, whose libraries raise wherever they
        wait.
        """

    def close(self) -> None:
        """Leaves the world in good order. Collective."""


def from_first(world: World, decide: Callable[[], object], name: str) -> Any:
    """Calls `decide` on rank 0, and returns its plain JSON values on every rank. Collective.

    Raises UserError on every rank if `decide` raises it.
    """
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
    """A context in which a lost rank raises PeerError, whichever library notices it."""
    try:
        yield
    except RuntimeError as error:
        if (gone := world.lost(error)) is not None:
            raise gone from None
        raise


def first_problem(problems: list[str]) -> str | None:
    """The first problem among those of all ranks, or None. It names the rank, unless all have the same problem."""
    rank = next((r for r, problem in enumerate(problems) if problem), None)
    if rank is None:
        return None
    return problems[rank] if len(set(problems)) == 1 else f"on rank {rank}: {problems[rank]}"
