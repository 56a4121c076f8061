"""What the tests of wires share: a small map, gradients that differ between ranks and rounds, and rounds of sums."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from hvdllm.exchange.wire.build import make_wire
from hvdllm.flat import Flat
from hvdllm.world import virtual

NOMINAL = 3000


class Net(nn.Module):
    """Buckets: one of 39,000 elements, one of 1,271 (a multiple of nothing), one of vectors; all padded at 4 ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(150, 260, dtype=dtype)
        self.b = nn.Linear(41, 31, dtype=dtype)


class Rig:
    """One rank."""

    def __init__(self, world: Any, settings: Any, dtype: torch.dtype, bucket_bytes: float) -> None:
        self.world = world
        self.flat = Flat(Net(dtype), world.size, bucket_bytes)
        self.wire = make_wire(settings, world, self.flat, NOMINAL)

    def fill(self, t: int) -> torch.Tensor:
        """This rank's gradient of round t; padding stays zero."""
        rng = np.random.default_rng([t, self.world.rank])
        self.flat.g.zero_()
        for name in self.flat.at:
            view = self.flat.view(name, self.flat.g)
            view.copy_(torch.from_numpy(rng.normal(size=view.shape) ** 3 * 10.0 ** rng.uniform(-1, 1)))
        return self.flat.g.clone()

    def sum(self) -> torch.Tensor:
        """What is in the gradient vector, summed: the whole, at this rank."""
        flights = [self.wire.sum(self.flat.g[b.span.start : b.span.stop], f"grad.{b.index}") for b in self.flat.buckets]
        for flight in flights:
            flight.land()
        return self.flat.g.clone()

    def scatter(self) -> torch.Tensor:
        """The pieces of this rank, in the map; zeros elsewhere."""
        g, out = self.flat.g, torch.zeros_like(self.flat.g)
        flights = [self.wire.scatter(g[b.span.start : b.span.stop], f"grad.{b.index}") for b in self.flat.buckets]
        for span, flight in zip(self.flat.slices(self.world.rank, self.world.size), flights, strict=True):
            out[span.start : span.stop] = flight.land()
        return out

    def saved(self) -> tuple[dict[str, Any], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """state(), the summed vectors over the whole map, as a checkpoint holds them."""
        shared, summed, tensors = self.wire.state()
        full = {}
        for name, (spans, vector) in summed.items():
            full[name] = torch.zeros_like(self.flat.x)
            for span, part in zip(spans, vector.split([s.stop - s.start for s in spans]), strict=True):
                full[name][span.start : span.stop] += part
        return shared, full, tensors

    def left(self) -> torch.Tensor:
        """What this rank keeps, over the map."""
        summed = self.saved()[1]
        return sum((summed[kind] for kind in ("residual", "owner") if kind in summed), torch.zeros_like(self.flat.x))


def run(
    n: int,
    settings: Any,
    body: Callable[[Rig], Any],
    hosts: int = 1,
    dtype: torch.dtype = torch.float64,
    bucket_bytes: float = 100_000,
) -> Any:
    """What body returns, on each rank. hosts: how many there are, ranks numbered host by host."""
    return virtual.run(n, lambda world: body(Rig(world, settings, dtype, bucket_bytes)), hosts=hosts)
