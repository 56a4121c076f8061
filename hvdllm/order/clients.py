"""The clients of a federation: which client owns a document, and what a client reads.

Both are functions of the data and the seed alone, so they are the same for any number of ranks.

document  items that belong together, and wholly to one client: the windows of text that begin in one document
share     of the items that a client should have: drawn from Dirichlet(alpha, ..., alpha), or 1 / clients
position  how many of its own items a client has taken: with W items, position k is item k % W in the order of
          epoch k // W

Documents are dealt in a random order. Each goes to the client that then is least full, measured by its share. A small
alpha makes a few clients large (at .1 some have nearly nothing), a large alpha makes all clients alike. Hsu et al.,
2019, arXiv 1909.06335, split by Dirichlet's distribution too, but over labels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hvdllm.errors import UserError
from hvdllm.order.epochs import drawn

DEAL, ROUND, EPOCH = range(3)  # keys of seeds, one for each kind of draw


class Clients:
    """The items of a data set, dealt to clients.

    `tokens` lists how many units (tokens of text) the items of each client count. A client with 0 has no items and is
    never sampled.
    """

    def __init__(self, documents: np.ndarray, units: float, count: int, alpha: float | None, seed: int) -> None:
        """Deals the documents.

        Args:
            documents: the number of the document that each item belongs to, int64 [items].
            units: how many units an item counts in the mean.
            count: the number of clients.
            alpha: the parameter of Dirichlet's distribution; None for equal shares.
            seed: the run's seed.

        Raises UserError if one of several clients would own every item.
        """
        self.seed = seed
        draw = drawn(seed, DEAL)
        shares = np.full(count, 1 / count) if alpha is None else draw.dirichlet(np.full(count, alpha))
        owner = owners(np.bincount(documents), shares, draw)[documents]
        self._items = [np.flatnonzero(owner == client) for client in range(count)]
        self.tokens = [int(len(items) * units) for items in self._items]
        self.known = [client for client in range(count) if len(self._items[client])]
        if len(self.known) < min(2, count):
            raise UserError(
                f"one of the {count} clients gets all of the data, because a document (a file, a line of .jsonl, a "
                "user with all clicks) belongs wholly to one client: give more of them, or raise exchange.alpha"
            )
        self._order = lru_cache(maxsize=4)(
            lambda client, epoch: drawn(seed, EPOCH, client, epoch).permutation(self._items[client])
        )

    def sample(self, round: int, count: int | None) -> list[int]:
        """The clients of a round in ascending order: `count` of those that have text, or all of them if it is None."""
        if count is None:
            return self.known
        return sorted(drawn(self.seed, ROUND, round).permutation(self.known)[:count].tolist())

    def visits(self, client: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items at these positions of a client, and its epochs there, both int64 [positions]."""
        epochs, places = np.divmod(positions, len(self._items[client]))
        orders = [self._order(client, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate([np.empty(0, np.int64), *orders]), epochs


def owners(sizes: np.ndarray, shares: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
    """Which client owns each document, int64 [documents].

    Args:
        sizes: how many items each document has.
        shares: the share of each client; they add up to 1.
        draw: the random numbers that decide the order of dealing.
    """
    owner, got = np.zeros(len(sizes), np.int64), np.zeros(len(shares))
    with np.errstate(divide="ignore"):  # a share may be 0 to the last digit
        for document in draw.permutation(np.flatnonzero(sizes)):
            owner[document] = client = int(np.argmin((got + sizes[document]) / shares))
            got[client] += sizes[document]
    return owner
