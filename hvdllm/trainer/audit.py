"""Compares the weights of the ranks, tables included: are they equal, or how far are they apart if they may differ?

Invariant: equal replicas have equal fingerprints, however their flat maps are padded and cut. Fingerprints differ as
soon as one bit differs, or if two elements of a tensor have changed places.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from hvdllm.flat import Flat
from hvdllm.world.base import World

CHUNK = 2**18  # 64-bit words that share one table of weights


@dataclass(frozen=True)
class Audit:
    """What an audit found: the first parameter, in registration order, that is not the same on all ranks.

    Attributes:
        parameter: its name.
        rank: the first rank whose bits differ from those of most ranks; 0 in a tie.
        tie: whether no value is the most frequent one.
        parameters: how many parameters differ.
    """

    parameter: str
    rank: int
    tie: bool
    parameters: int

    def __str__(self) -> str:
        more = f" and {self.parameters - 1} more" if self.parameters > 1 else ""
        return f"`{self.parameter}`{more}, " + ("on no rank as on most others" if self.tie else f"on rank {self.rank}")


def audit(flat: Flat, world: World) -> Audit | None:
    """The first difference between the ranks' weights, bit for bit, or None. All ranks get the same. Collective."""
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
    return Audit([*flat.parameters, *flat.tables][differ[0]], rank, tie, len(differ))


def fingerprint(flat: Flat) -> torch.Tensor:
    """A hash of each parameter, in registration order, and then of each table: int64 [parameters and tables], on the
    device, without a host read.

    The bits of a tensor are taken as 64-bit words. Within a chunk each word is multiplied by an odd weight, and the
    products are summed modulo 2^64; the sums of a tensor's chunks are joined in the same way. Since weights are odd,
    every flipped bit changes the hash. Since they depend on the place, so does every swap.
    """
    device = flat.x.device
    table = _table(device)
    sums, owners, weights = [], [], []
    tensors = [flat.x[flat.at[name]] for name in flat.parameters]
    tensors += [table.weight.reshape(-1) for table in flat.tables.values()]
    for number, tensor in enumerate(tensors):
        for index, words in enumerate(_words(tensor.detach()).split(CHUNK)):
            sums.append((words * table[: len(words)]).sum())
            owners.append(number)
            weights.append(2 * index + 1)
    weighted = torch.stack(sums) * torch.tensor(weights, device=device)
    totals = torch.zeros(len(tensors), dtype=torch.int64, device=device)
    return totals.index_add_(0, torch.tensor(owners, device=device), weighted)


def _words(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as int64, with zeros appended to fill the last word."""
    missing = -len(x) % (8 // x.element_size())
    return (pad(x, (0, missing)) if missing else x).view(torch.int64)


@lru_cache(maxsize=1)
def _table(device: torch.device) -> torch.Tensor:
    """Random odd weights, int64 [CHUNK], the same on all ranks."""
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (CHUNK,), generator=draw) | 1).to(device)


def spread(flat: Flat, world: World) -> float:
    """Root mean square distance of the ranks' weights to their mean, relative to the mean's norm. Collective.

    Returns sqrt(mean_r |x_r - mean|²) / |mean|, the same on all ranks. The mean is taken in the dtype of the weights,
    so for equal replicas the result is its rounding error (about 1e-8 in fp32). The whole vector is summed once, one
    bucket at a time.
    """
    squares = torch.zeros(2, dtype=torch.float64)  # squared norms of the distance and the mean, summed over ranks
    for bucket in flat.buckets:
        own = flat.x[bucket.span.start : bucket.span.stop].detach()
        mean = world.sum(own.clone(), f"act.audit.{bucket.index}").land() / world.size
        squares[0] += torch.linalg.vector_norm(own - mean, dtype=torch.float64).cpu() ** 2
        squares[1] += torch.linalg.vector_norm(mean, dtype=torch.float64).cpu() ** 2
    distance, norm = world.sum(squares, "act.audit.spread").land().sqrt().tolist()
    if norm == 0:
        return float("inf") if distance else 0.0
    return float(distance / norm)
