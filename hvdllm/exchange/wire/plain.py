"""A sum in the gradients' own dtype: what is decoded is what was sent.

The key `grad.<bucket>` becomes the operation `grad.<bucket>.<parity>`. Names are few and fixed, because Horovod matches
and caches by name. There are two in turn, because the next sum may be launched before the last one is applied.
Gradients that are summed in place may not be touched until the flight has landed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

from hvdllm.exchange.base import Spanned, Values
from hvdllm.exchange.wire import parts as wires
from hvdllm.flat import Bucket, Flat, Span
from hvdllm.world.base import Flight, World

# What of a bucket arrives at a wire, in order: the whole bucket, or in a hierarchy this rank's part of it.
Spans = Callable[[Bucket], list[Span]]
# The stages of one sum, from its vector to what lands; they are walked on the driver thread.
Work = Callable[[torch.Tensor], torch.Tensor]

PART_BYTES = 2**19  # to one rank at a time
W = TypeVar("W", bound=wires.Wire)


def parts(piece: torch.Tensor) -> list[slice]:
    """Parts of a rank's piece that travel one after the other.

    Over TCP between CPUs, messages of some MB each way left a shaped link idle for a third of the time (4.9 MB both
    ways at 200 Mbit/s: 320 ms as a whole, 200 ms in parts of half a MB). NCCL divides messages by itself.
    """
    length = piece.numel()
    step = length if piece.is_cuda else max(1, PART_BYTES // piece.element_size())
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class Several:
    """Flights that count as one. join: from what they land to what lands."""

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
    columns = parts(rows[0])
    if len(columns) == 1:
        return world.scatter(x, name)
    flights = [world.scatter(rows[:, part].reshape(-1), f"{name}.{k}") for k, part in enumerate(columns)]
    return Several(flights, torch.cat)


def gather(world: World, piece: torch.Tensor, name: str) -> Flight:
    """world.gather of pieces of one length, in parts."""
    slices = parts(piece)
    if len(slices) == 1:
        return world.gather(piece, name, equal=True)
    flights = [world.gather(piece[part], f"{name}.{k}", equal=True) for k, part in enumerate(slices)]
    return Several(flights, lambda landed: torch.cat([x.view(world.size, -1) for x in landed], 1).view(-1))


class Plain(Generic[W]):
    """Every wire is made from a world, settings, the flat vector, the tokens of a global batch, and the spans that
    arrive at it. This one has no use for the last three."""

    rough = False

    def __init__(
        self, world: World, settings: W | None = None, flat: Flat | None = None, nominal: int = 0,
        spans: Spans | None = None,
    ) -> None:  # fmt: skip
        self.world, self.settings = world, settings
        self.parity: dict[str, int] = {}

    def name(self, key: str) -> str:
        """The name of the next operation under this key."""
        self.parity[key] = 1 - self.parity.get(key, 1)
        return f"{key}.{self.parity[key]}"

    def begin(self, committed: int, weight: float) -> None:
        """Nothing is kept whose worth a weight could change."""

    # ------------------------------------------------------------------ flights
    def sum(self, x: torch.Tensor, key: str) -> Flight:
        return self.world.sum(x, self.name(key))

    def scatter(self, x: torch.Tensor, key: str) -> Flight:
        return scatter(self.world, x, self.name(key))

    def spread(self, piece: torch.Tensor, key: str) -> Flight:
        return gather(self.world, piece, self.name(key))

    # ------------------------------------------------------------------ the same as stages of a longer flight
    def summing(self, key: str) -> Work:
        """Is called at the launch, which fixes the name. What it returns is called on the driver thread."""
        name = self.name(key)
        return lambda x: self.world.sum(x, name).land()

    def scattering(self, key: str) -> Work:
        name = self.name(key)
        return lambda x: scatter(self.world, x, name).land()

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> tuple[Values, dict[str, Spanned], dict[str, torch.Tensor]]:
        return {}, {}, {}

    def load(self, shared: Values, summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        """Nothing is kept."""


class Staged(Plain[W]):
    """A wire whose flights have several stages: they are walked on the driver thread."""

    def sum(self, x: torch.Tensor, key: str) -> Flight:
        work = self.summing(key)
        return self.world.drive(lambda: work(x))

    def scatter(self, x: torch.Tensor, key: str) -> Flight:
        work = self.scattering(key)
        return self.world.drive(lambda: work(x))
