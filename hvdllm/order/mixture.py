"""A mixture of data sets: which item of which of them stands at which position.

Positions are taken in blocks. Each block has the same number of items of each data set, in an order of its own, so the
shares hold within every batch nearly, and within a run up to one block. Each data set goes through epochs of its own: a
small one with a large share comes round often.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

from hvdllm.order.epochs import Epochs, drawn

BLOCK = 10_000  # items, the most in a block; a share is exact to half of this part
MIX = 7  # key of seeds, apart from those of order/clients.py


class Mixture:
    """The order of the items of several data sets, numbered one data set after the other.

    Args:
        sizes: how many items each has, at least 1.
        shares: of the items that each provides, above 0. They add up to 1.
        seed: of the run.
    """

    def __init__(self, sizes: Sequence[int], shares: Sequence[float], seed: int) -> None:
        counts = counted(shares)
        self.counts, self.block = np.array(counts), sum(counts)
        self._first = np.cumsum([0, *sizes])
        self._epochs = [Epochs(size, seed, number + 1) for number, size in enumerate(sizes)]
        owners = np.repeat(np.arange(len(counts)), counts)
        self._owners = lru_cache(maxsize=64)(lambda block: drawn(seed, MIX, block).permutation(owners))

    def visits(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items at these positions, and the epochs of their data sets there, both int64 [positions]."""
        blocks, places = np.divmod(positions, self.block)
        items, epochs = np.empty((2, len(positions)), np.int64)
        for block in np.unique(blocks):
            owners = self._owners(int(block))
            for number, of in enumerate(self._epochs):
                mine = (blocks == block) & (owners[places] == number)
                before = np.cumsum(owners == number) - 1  # how many items of it stand before each place
                items[mine], epochs[mine] = of.visits(int(block) * self.counts[number] + before[places[mine]])
                items[mine] += self._first[number]
        return items, epochs


def counted(shares: Sequence[float]) -> list[int]:
    """How many items of a block each data set provides, at least one.

    The block is as short as exact shares allow, such as 10 items for .7 and .3, and else has BLOCK items.
    """
    exact = [Fraction(share).limit_denominator(BLOCK) for share in shares]
    block = math.lcm(*(share.denominator for share in exact))
    if block <= BLOCK and sum(exact) == 1 and all(abs(a - b) < 1e-9 for a, b in zip(exact, shares, strict=True)):
        return [int(share * block) for share in exact]
    counts = [max(1, math.floor(share * BLOCK)) for share in shares]
    rest = sorted(range(len(shares)), key=lambda number: counts[number] - shares[number] * BLOCK)
    for number in rest[: max(0, BLOCK - sum(counts))]:
        counts[number] += 1
    return counts
