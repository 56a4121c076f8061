"""What the tests of wires share: a small map, gradients that differ between ranks and rounds, rounds of sums, and the
algorithm of the coded wires in NumPy."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from hvdllm.exchange.wire.build import make_wire
from hvdllm.exchange.wire.parts import Fp32
from hvdllm.flat import Flat
from hvdllm.world import virtual

NOMINAL = 3000
LENGTH = 4096 + 1288  # of a row: short last blocks of 256 and 1024
Code = Callable[[np.ndarray], np.ndarray]


class Net(nn.Module):
    """Buckets: one of 39,000 elements, one of 1,271 (a multiple of nothing), one of vectors; all padded at 4 ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Linear(150, 260, dtype=dtype)
        self.b = nn.Linear(41, 31, dtype=dtype)


@cache
def draws(t: int, rank: int, shapes: tuple[tuple[int, ...], ...]) -> list[torch.Tensor]:
    rng = np.random.default_rng([t, rank])
    return [torch.from_numpy(rng.normal(size=shape) ** 3 * 10.0 ** rng.uniform(-1, 1)) for shape in shapes]


class Rig:
    """One rank."""

    def __init__(self, world: Any, settings: Any, dtype: torch.dtype, bucket_bytes: float) -> None:
        self.world = world
        self.flat = Flat(Net(dtype), world.size, bucket_bytes)
        self.wire = make_wire(settings, world, self.flat, NOMINAL)

    def fill(self, t: int) -> torch.Tensor:
        """This rank's gradient of round t; padding stays zero."""
        self.flat.g.zero_()
        views = [self.flat.view(name, self.flat.g) for name in self.flat.at]
        for view, drawn in zip(views, draws(t, self.world.rank, tuple(tuple(v.shape) for v in views)), strict=True):
            view.copy_(drawn)
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


def equals_numpy(n: int, settings: Any, there: Code, back: Code) -> None:
    """Rounds of sums over n ranks against the algorithm in NumPy.

    there, back: what the code makes of a piece on its way to its owner, and of the sum on the way back. What arrives is
    compared over rounds, so the residuals of both roundings have to be right too.
    """
    rounds = 4

    def body(rig: Rig) -> tuple[list[torch.Tensor], list[torch.Tensor], Any]:
        came, went = [], []
        for t in range(rounds):
            came.append(rig.fill(t))
            went.append(rig.sum())
        return came, went, rig.flat

    results = run(n, settings, body)
    flat = results[0][2]
    used = np.zeros(len(flat.x), bool)
    for place in flat.at.values():
        used[place] = True
    for bucket in flat.buckets[:2]:  # the third is of vectors
        span = slice(bucket.span.start, bucket.span.stop)
        pieces = np.split(np.arange(span.start, span.stop), n)
        e, own = np.zeros((n, len(flat.x))), np.zeros(len(flat.x))
        for t in range(rounds):
            want = np.zeros(len(flat.x))
            for piece in pieces:
                y = own[piece]
                for i in range(n):
                    u = results[i][0][t][piece].numpy() + e[i, piece]
                    decoded = there(u) * used[piece]
                    e[i, piece] = u - decoded
                    y = y + decoded
                want[piece] = back(y) * used[piece]
                own[piece] = y - want[piece]
            got = results[0][1][t].numpy()
            assert np.allclose(got[span], want[span], rtol=1e-6, atol=1e-9 * abs(want).max()), f"round {t}"
            assert abs(got[span]).max() > 0


def matrix_bytes(n: int, settings: Any) -> float:
    """The bytes that a rank sends for the bucket of the large matrix."""

    def body(rig: Rig) -> float:
        rig.fill(0)
        before, span = rig.world.bytes_sent, rig.flat.buckets[0].span
        rig.wire.sum(rig.flat.g[: span.stop], "grad.0").land()
        return float(rig.world.bytes_sent - before)

    return float(run(n, settings, body, dtype=torch.float32)[0])


@cache
def whole_bytes(n: int) -> float:
    """The same in full precision."""
    return matrix_bytes(n, Fp32())


def blocks(u: np.ndarray, size: int) -> list[np.ndarray]:
    return [u[i : i + size] for i in range(0, len(u), size)]


def rows(kind: str) -> torch.Tensor:
    """Three rows to encode."""
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(3, LENGTH)))
    if kind == "spikes":  # one element is nearly all there is of its block
        x *= 1e-4
        x[:, ::1024] = torch.tensor([[3.0], [-2.0], [1.0]])
    if kind == "cubes":
        x = x**3 * 10.0 ** torch.linspace(-3, 2, LENGTH)
    if kind == "zeros":
        x[1] = 0
        x[2, 100:3000] = 0
    return x
