"""Do the ranks hold the same weights? And where they need not, how far apart are they?

Invariant: two replicas have equal fingerprints whatever the padding and the cuts of their maps, and different ones as
soon as one bit differs, or two elements of a tensor have changed places.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from hvdllm.flat import Flat
from hvdllm.world.base import World

CHUNK = 2**18  # words that share one table of weights


@dataclass(frozen=True)
class Audit:
    """The first parameter, in registration order, that is not the same on all ranks.

    rank: the first whose bits are not those that most ranks have; tie: there are none such, rank is 0 then.
    parameters: how many differ.
    """

    parameter: str
    rank: int
    tie: bool
    parameters: int

    def __str__(self) -> str:
        more = f" and {self.parameters - 1} more" if self.parameters > 1 else ""
        return f"`{self.parameter}`{more}, " + ("on no rank as on most others" if self.tie else f"on rank {self.rank}")


def audit(flat: Flat, world: World) -> Audit | None:
    """The first difference between the ranks' weights, bit for bit, or None. The same on all ranks. Collective."""
    if world.size == 1:
        return None
    own = fingerprint(flat).cpu().reshape(1, -1)
    prints = world.gather(own, "act.audit", equal=True).land()  # [ranks, tensors]
    differ = (prints != prints[:1]).any(0).nonzero().reshape(-1).tolist()
    if not differ:
        return None
    column = prints[:, differ[0]].tolist()
    (most, count), *others = Counter(column).most_common()
    tie = others[0][1] == count
    rank = 0 if tie else next(r for r, value in enumerate(column) if value != most)
    return Audit(list(flat.parameters)[differ[0]], rank, tie, len(differ))


def fingerprint(flat: Flat) -> torch.Tensor:
    """One number a parameter, in registration order: int64 [tensors], on the device; nothing waits for it.

    The bits as 64-bit words times odd weights, summed over a chunk of words, then the same over a tensor's chunks, all
    modulo 2^64. An odd weight makes every flipped bit count; that it depends on the place, every swap.
    """
    device = flat.x.device
    table = _table(device)
    sums, owners, weights = [], [], []
    for number, place in enumerate(flat.at[name] for name in flat.parameters):
        for index, words in enumerate(_words(flat.x[place].detach()).split(CHUNK)):
            sums.append((words * table[: len(words)]).sum())
            owners.append(number)
            weights.append(2 * index + 1)
    weighted = torch.stack(sums) * torch.tensor(weights, device=device)
    totals = torch.zeros(len(flat.parameters), dtype=torch.int64, device=device)
    return totals.index_add_(0, torch.tensor(owners, device=device), weighted)


def _words(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as int64, what is missing of the last word filled with zeros."""
    missing = -len(x) % (8 // x.element_size())
    return (pad(x, (0, missing)) if missing else x).view(torch.int64)


@lru_cache(maxsize=1)
def _table(device: torch.device) -> torch.Tensor:
    """Odd int64 [CHUNK], the same on all ranks."""
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=draw) | 1).to(device)


def spread(flat: Flat, world: World) -> float:
    """Root mean square distance of the ranks' weights to their mean, relative to the mean's norm. Collective.

    sqrt(mean_r |x_r - mean|²) / |mean|, the same on all ranks. The mean is taken in the weights' own dtype, so equal
    replicas show its rounding (about 1e-8 in fp32). One sum of the whole vector, one bucket at a time.
    """
    squares = torch.zeros(2, dtype=torch.float64)  # of the distance, of the mean; both summed over ranks
    for bucket in flat.buckets:
        own = flat.x[bucket.span.start : bucket.span.stop].detach()
        mean = world.sum(own.clone(), f"act.audit.{bucket.index}").land() / world.size
        squares[0] += torch.linalg.vector_norm(own - mean, dtype=torch.float64).cpu() ** 2
        squares[1] += torch.linalg.vector_norm(mean, dtype=torch.float64).cpu() ** 2
    distance, norm = world.sum(squares, "act.audit.spread").land().sqrt().tolist()
    if norm == 0:
        return float("inf") if distance else 0.0
    return float(distance / norm)
