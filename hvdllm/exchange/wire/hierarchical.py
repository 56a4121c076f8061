"""Two levels: inside a host in full precision, then each rank's share of the host's sum across hosts, coded or not.

Ranks are numbered host by host, L on each of H: rank = host * L + place. With x of a bucket as [H, L, k],

    [L, H, k]: local scatter     # this rank: the host's sum of the pieces of rank (h, place), for all hosts h
    [H, k]:    cross sum through the inner wire, over the ranks of equal place
    [L, H, k]: local gather, and back to [H, L, k]

Invariant: it is the sum over all ranks, up to its order and the inner wire's code. `scatter` ends at the inner scatter
with [k], the piece of this rank as everywhere, and `spread` is the way back from there. Bytes over the slow link in a
sum: 2 (H-1)/H P/L b' a rank, that is 2 (H-1)/H P b' a host, where one ring that is laid host by host sends 2 (N-1)/N P
b. The inner wire has H ranks and [H, k], so its residuals are P/L, those of this rank's place.

In a checkpoint these are spans of the flat vector. When it is loaded, each host adds up what its ranks were given and
hands it to the ranks of the place. At the same world size nothing moves; at another one the total, which rank 0 was
given, finds its owners.

More in hvdllm/exchange/wire/README.md, "Two levels".
"""

from __future__ import annotations

from typing import Any

import torch

from hvdllm.errors import UserError
from hvdllm.exchange.base import Spanned, Values
from hvdllm.exchange.wire import parts as wires
from hvdllm.exchange.wire.plain import Plain, Staged, Work, gather, scatter
from hvdllm.flat import Bucket, Flat, Span
from hvdllm.world.base import Flight, World


class Hierarchical(Staged[wires.Wire]):
    """kind: of the inner wire."""

    def __init__(self, world: World, settings: wires.Wire, flat: Flat, nominal: int, kind: type[Plain[Any]]) -> None:
        super().__init__(world)
        self.rough = kind.rough
        self.flat = flat
        self.places, self.hosts = _layout(world)
        hosts, places = range(self.hosts), range(self.places)
        self.local = world.split([tuple(h * self.places + p for p in places) for h in hosts], "split.local")
        self.cross = world.split([tuple(h * self.places + p for h in hosts) for p in places], "split.cross")
        self.inner = kind(self.cross, settings, flat, nominal, self._spans)

    def begin(self, committed: int, weight: float) -> None:
        self.inner.begin(committed, weight)

    # ------------------------------------------------------------------ flights
    def spread(self, piece: torch.Tensor, key: str) -> Flight:
        name = self.name(key)

        def work() -> torch.Tensor:
            return self._join(gather(self.cross, piece, f"{name}.cross").land(), name).reshape(-1)

        return self.world.drive(work)

    def summing(self, key: str) -> Work:
        name, inner = self.name(key), self.inner.summing(key)

        def work(x: torch.Tensor) -> torch.Tensor:
            share = inner(self._share(x, f"{name}.host"))
            x.view(self.hosts, self.places, -1).copy_(self._join(share, name))
            return x

        return work

    def scattering(self, key: str) -> Work:
        name, inner = self.name(key), self.inner.scattering(key)
        return lambda x: inner(self._share(x, f"{name}.host"))

    def _share(self, x: torch.Tensor, name: str) -> torch.Tensor:
        """[H, L, k] of each rank to [H k], this place's, summed over the host. x may be spent."""
        by_place = x.view(self.hosts, self.places, -1).transpose(0, 1).reshape(-1)
        share: torch.Tensor = scatter(self.local, by_place, name).land()
        return share

    def _join(self, share: torch.Tensor, name: str) -> torch.Tensor:
        """[H k] of each place to [H, L, k]."""
        joined: torch.Tensor = gather(self.local, share, f"{name}.join").land()
        return joined.view(self.places, self.hosts, -1).transpose(0, 1)

    # ------------------------------------------------------------------ checkpoint
    def _spans(self, bucket: Bucket) -> list[Span]:
        """What of a bucket arrives at the inner wire."""
        start, stop, place = bucket.span.start, bucket.span.stop, self.local.rank
        k = (stop - start) // self.world.size
        begins = [start + (host * self.places + place) * k for host in range(self.hosts)]
        return [bucket.span._replace(start=begin, stop=begin + k) for begin in begins]

    def state(self) -> tuple[Values, dict[str, Spanned], dict[str, torch.Tensor]]:
        return self.inner.state()

    def load(self, shared: Values, summed: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]) -> None:
        """Collective: the same kinds of vectors on all ranks."""
        given = {kind: self._hand_out(kind, vector) for kind, vector in sorted(summed.items())}
        self.inner.load(shared, given, tensors)

    def _hand_out(self, kind: str, vector: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(vector)
        for bucket in self.flat.buckets:
            name = f"load.wire.{kind}.{bucket.index}"
            share = self._share(vector[bucket.span.start : bucket.span.stop].clone(), name)
            for span, part in zip(self._spans(bucket), share.view(self.hosts, -1), strict=True):
                out[span.start : span.stop] = part
        return out


def _layout(world: World) -> tuple[int, int]:
    """Ranks a host, and hosts. Raises UserError, on all ranks, where ranks are not numbered host by host, as many on
    each."""
    said = [tuple(map(int, text.split())) for text in world.texts(f"{world.local_rank} {world.local_size}", "hosts")]
    places = said[0][1]
    if world.size % places or said != [(rank % places, places) for rank in range(world.size)]:
        raise UserError(
            "wire.hierarchical=true needs as many ranks on each host, numbered host by host: the (local rank, local "
            f"size) are {', '.join(map(str, said))}; change the launcher's hosts or set wire.hierarchical=false"
        )
    return places, world.size // places
