"""Epochs over N items: every item once in each, in an order of its own."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def deal(count: int, rank: int, size: int) -> tuple[int, int]:
    """(first, count): the consecutive share of one rank if `count` things are dealt to `size` ranks."""
    each, more = divmod(count, size)
    return rank * each + min(rank, more), each + (rank < more)


def permutation(items: int, seed: int, epoch: int, *key: int) -> np.ndarray:
    """The order of the items in an epoch, int64 [items]. `key` tells data sets apart that have the same seed."""
    return frozen(np.random.SeedSequence([seed, epoch, *key])).permutation(items)


class Epochs:
    """The items in an order of their own in each epoch.

    Args:
        items: how many there are.
        seed: of the run.
        key: tells data sets apart that have the same seed.
    """

    def __init__(self, items: int, seed: int, *key: int) -> None:
        self.items = items
        # A round touches at most two epochs, since there are as many items as a batch takes. Lanes may be a little
        # apart.
        self._order = lru_cache(maxsize=3)(lambda epoch: permutation(items, seed, epoch, *key))

    def visits(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items at these positions, and the epochs in which they are visited there, both int64 [positions]."""
        epochs, places = np.divmod(positions, self.items)
        items = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            items[epochs == epoch] = self._order(int(epoch))[places[epochs == epoch]]
        return items, epochs


def drawn(seed: int, *key: int) -> np.random.RandomState:
    """Random numbers that depend on the seed and on a key, such as (ROUND, 7)."""
    return frozen(np.random.SeedSequence(seed, spawn_key=key))


def frozen(seeds: np.random.SeedSequence) -> np.random.RandomState:
    """A RandomState, because NumPy has frozen its stream (NEP 19).

    A run that is resumed under another version of NumPy reads on in the same order. Generator does not promise that.
    """
    return np.random.RandomState(np.random.MT19937(seeds))
