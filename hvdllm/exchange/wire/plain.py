"""A sum in the gradients' own dtype: what is decoded is what was sent.

The key `grad.<bucket>` becomes the operation `grad.<bucket>.<parity>`: names are few and fixed, because Horovod
matches and caches by name, and two in turn, because the next sum may be launched before the last is applied.
Gradients that are summed in place may not be touched until the flight has landed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hvdllm.exchange.base import Spanned
from hvdllm.world.base import Flight, World

# What of a bucket arrives at a wire, in order: the whole bucket, or under a hierarchy this rank's part of it.
Spans = Callable[[Any], list[Any]]
# The stages of one sum, from its vector to what lands, to be walked on the driver thread.
Work = Callable[[torch.Tensor], torch.Tensor]


PART_BYTES = 2**19  # to one rank at a time


def parts(piece: torch.Tensor) -> list[slice]:
    """Cuts of a rank's piece that travel one after the other.

    Over TCP between CPUs a message of some MB each way left a shaped link idle for a third of the time (4.9 MB both
    ways at 200 Mbit/s: 320 ms whole, 200 in parts of half a MB); NCCL cuts by itself.
    """
    length = piece.numel()
    step = length if piece.is_cuda else max(1, PART_BYTES // piece.element_size())
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class Several:
    """Flights that count as one. join: what lands, of what they land."""

    def __init__(self, flights: list[Flight], join: Callable[[list[Any]], Any]) -> None:
        self.flights, self.join = flights, join
        self.value: Any = None

    def landed(self) -> bool:
        return all(flight.landed() for flight in self.flights)

    def land(self) -> Any:
        if self.value is None:
            self.value = self.join([flight.land() for flight in self.flights])
        return self.value


def scatter(world: World, x: torch.Tensor, name: str) -> Flight:
    """world.scatter in parts."""
    rows = x.view(world.size, -1)
    cuts = parts(rows[0])
    if len(cuts) == 1:
        return world.scatter(x, name)
    flights = [world.scatter(rows[:, cut].reshape(-1), f"{name}.{k}") for k, cut in enumerate(cuts)]
    return Several(flights, torch.cat)


def gather(world: World, piece: torch.Tensor, name: str) -> Flight:
    """world.gather of pieces of one length, in parts."""
    cuts = parts(piece)
    if len(cuts) == 1:
        return world.gather(piece, name, equal=True)
    flights = [world.gather(piece[cut], f"{name}.{k}", equal=True) for k, cut in enumerate(cuts)]
    return Several(flights, lambda landed: torch.cat([x.view(world.size, -1) for x in landed], 1).view(-1))


class Plain:
    """settings, flat and nominal, what every wire is made from, say nothing to this one."""

    rough = False

    def __init__(
        self, world: World, settings: Any = None, flat: Any = None, nominal: int = 0, spans: Spans | None = None
    ) -> None:
        self.world, self.settings = world, settings
        self.parity: dict[str, int] = {}

    def name(self, key: str) -> str:
        """Of the next operation under this key."""
        self.parity[key] = 1 - self.parity.get(key, 1)
        return f"{key}.{self.parity[key]}"

    def begin(self, committed: int, weight: float) -> None:
        """Nothing is kept, so nothing has to be worth the same."""

    # ------------------------------------------------------------------ flights
    def sum(self, x: torch.Tensor, key: str) -> Flight:
        return self.world.sum(x, self.name(key))

    def scatter(self, x: torch.Tensor, key: str) -> Flight:
        return scatter(self.world, x, self.name(key))

    def spread(self, piece: torch.Tensor, key: str) -> Flight:
        return gather(self.world, piece, self.name(key))

    # ------------------------------------------------------------------ the same as stages of a longer flight
    def summing(self, key: str) -> Work:
        """Called at the launch, which fixes the name; what it returns is called on the driver thread."""
        name = self.name(key)
        return lambda x: self.world.sum(x, name).land()

    def scattering(self, key: str) -> Work:
        name = self.name(key)
        return lambda x: scatter(self.world, x, name).land()

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> tuple[dict[str, Any], dict[str, Spanned], dict[str, torch.Tensor]]:
        return {}, {}, {}

    def load(self, shared: dict[str, Any], summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        """Nothing is kept."""


class Staged(Plain):
    """A wire whose flights have several stages: they are walked on the driver thread."""

    def sum(self, x: torch.Tensor, key: str) -> Flight:
        work = self.summing(key)
        return self.world.drive(lambda: work(x))

    def scatter(self, x: torch.Tensor, key: str) -> Flight:
        work = self.scattering(key)
        return self.world.drive(lambda: work(x))
