"""The protocol of a world: some ranks, collectives matched by name, and what people ask of a run.

Invariant: every rank calls the same collectives under the same names. Names are fixed and few (Horovod
matches and caches by name), and a name is launched again only when its last use has landed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Flight(Protocol):
    """One thing travelling."""

    def landed(self) -> bool:
        """Host poll, never blocks."""

    def land(self) -> torch.Tensor:
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


class World(Protocol):
    """`x` is a tensor on any device; `name` is matched over the ranks."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    asks: Asks
    bytes_sent: float  # by this rank since the start, counted by the ring formulas of each collective

    def sum(self, x: torch.Tensor, name: str) -> Flight:
        """In place: every rank's x becomes the sum over ranks, bit-equal on all. x must not be touched in flight."""

    def gather(self, x: torch.Tensor, name: str) -> Flight:
        """Every rank gets all x, joined along dimension 0 in rank order; only dimension 0 may differ."""

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        """In place: every rank's x becomes root's."""

    def texts(self, text: str, name: str) -> list[str]:
        """Every rank's text, in rank order. Blocks."""

    def agree(self, problem: str | None, name: str) -> None:
        """Where any rank has a problem, every rank raises UserError with the first one's words. Blocks."""

    def close(self) -> None:
        """Leaves in good order, when every rank does."""


def first_problem(problems: list[str]) -> str | None:
    """The words for all ranks: the first rank's that has any, with its number where it is not the same on all."""
    rank = next((r for r, problem in enumerate(problems) if problem), None)
    if rank is None:
        return None
    return problems[rank] if len(set(problems)) == 1 else f"on rank {rank}: {problems[rank]}"
