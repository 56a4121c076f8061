"""The clients of a federation: which client owns a document, and what a client reads.

Both are functions of the text and the seed alone, so they are the same for any number of ranks.

document  tokens up to and with an end token; it belongs wholly to one client
share     of the text that a client should have: drawn from Dirichlet(alpha, ..., alpha), or 1 / clients
window    belongs to the client that owns the document in which the window begins
position  how many of its own windows a client has taken: with W windows, position k is window k % W in the order of
          epoch k // W

Documents are dealt in a random order. Each goes to the client that then is least full, measured by its share. A small
alpha makes a few clients large (at .1 some have nearly nothing), a large alpha makes all clients alike. Hsu et al.,
2019, arXiv 1909.06335, split by Dirichlet's distribution too, but over labels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hvdllm.errors import UserError

SCAN = 2**24  # tokens that are searched for the ends of documents at a time
DEAL, ROUND, EPOCH = range(3)  # keys of seeds, one for each kind of draw


class Clients:
    """The windows of a text, dealt to clients.

    `tokens` lists how many tokens the windows of each client hold. A client with 0 has no text and is never sampled.
    """

    def __init__(
        self, tokens: np.ndarray, context: int, end: int | None, count: int, alpha: float | None, seed: int
    ) -> None:
        """Deals the documents.

        Args:
            tokens: the training text, unsigned [n].
            context: tokens in a window, without the last target.
            end: the token between documents; None if the text is one document.
            count: the number of clients.
            alpha: the parameter of Dirichlet's distribution; None for equal shares.
            seed: the run's seed.

        Raises UserError if one of several clients would own every window.
        """
        self.seed = seed
        starts = np.arange(max(0, (len(tokens) - 1) // context)) * context
        # The document of each window. An end token belongs to the document before it.
        documents = np.searchsorted(_ends(tokens, end), starts)
        draw = drawn(seed, DEAL)
        shares = np.full(count, 1 / count) if alpha is None else draw.dirichlet(np.full(count, alpha))
        owner = owners(np.bincount(documents), shares, draw)[documents]
        self._windows = [np.flatnonzero(owner == client) for client in range(count)]
        self.tokens = [len(windows) * context for windows in self._windows]
        self.known = [client for client in range(count) if self.tokens[client]]
        if len(self.known) < min(2, count):
            raise UserError(
                f"one of the {count} clients gets all of the text, because a document belongs wholly to one client: "
                "give more documents (files, or lines of .jsonl), or raise exchange.alpha"
            )
        self._order = lru_cache(maxsize=4)(
            lambda client, epoch: drawn(seed, EPOCH, client, epoch).permutation(self._windows[client])
        )

    def sample(self, round: int, count: int | None) -> list[int]:
        """The clients of a round in ascending order: `count` of those that have text, or all of them if it is None."""
        if count is None:
            return self.known
        return sorted(drawn(self.seed, ROUND, round).permutation(self.known)[:count].tolist())

    def windows(self, client: int, positions: np.ndarray) -> np.ndarray:
        """Which windows of the text stand at these positions of a client, int64 [positions]."""
        epochs, places = np.divmod(positions, len(self._windows[client]))
        orders = [self._order(client, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate([np.empty(0, np.int64), *orders])


def owners(sizes: np.ndarray, shares: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
    """Which client owns each document, int64 [documents].

    Args:
        sizes: how many windows begin in each document.
        shares: the share of each client; they add up to 1.
        draw: the random numbers that decide the order of dealing.
    """
    owner, got = np.zeros(len(sizes), np.int64), np.zeros(len(shares))
    with np.errstate(divide="ignore"):  # a share may be 0 to the last digit
        for document in draw.permutation(np.flatnonzero(sizes)):
            owner[document] = client = int(np.argmin((got + sizes[document]) / shares))
            got[client] += sizes[document]
    return owner


def drawn(seed: int, *key: int) -> np.random.RandomState:
    """Random numbers that depend on the seed and on a key, such as (ROUND, 7)."""
    return frozen(np.random.SeedSequence(seed, spawn_key=key))


def frozen(seeds: np.random.SeedSequence) -> np.random.RandomState:
    """A RandomState, because NumPy has frozen its stream (NEP 19).

    A run that is resumed under another version of NumPy reads on in the same order. Generator does not promise that.
    """
    return np.random.RandomState(np.random.MT19937(seeds))


def _ends(tokens: np.ndarray, end: int | None) -> np.ndarray:
    """The places of the end tokens, in ascending order."""
    if end is None:
        return np.empty(0, np.int64)
    parts = [np.flatnonzero(tokens[at : at + SCAN] == end) + at for at in range(0, len(tokens), SCAN)]
    return np.concatenate([np.empty(0, np.int64), *parts])
