"""Clients of a federation: whose a document is, and what a client reads; a function of text and seed, not of ranks.

document  tokens up to and with an end token; it belongs wholly to one client
share     of the text that a client should have: drawn from Dirichlet(alpha, ..., alpha), or 1 / clients
window    of the client of the document in which it begins
position  how many windows of its own a client has taken: position k of its W is k % W of the order of epoch k // W

Documents are dealt in a drawn order, each to the client that it leaves least full for its share. A small alpha makes
few clients large (.1: some have nearly nothing), a large one all alike. (Splitting by Dirichlet: Hsu et al., 2019,
arXiv 1909.06335, there over labels.)
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hvdllm.errors import UserError

SCAN = 2**24  # tokens looked at for documents' ends at a time
DEAL, ROUND, EPOCH = range(3)  # what is drawn: keys of seeds that nothing else shares


class Clients:
    """tokens: of each client's text, those of its windows; 0: it has none, and is never sampled."""

    def __init__(
        self, tokens: np.ndarray, context: int, end: int | None, count: int, alpha: float | None, seed: int
    ) -> None:
        """end: the token between documents; None: the text is one. Raises UserError where one of several clients has
        all windows."""
        self.seed = seed
        starts = np.arange(max(0, (len(tokens) - 1) // context)) * context
        documents = np.searchsorted(_ends(tokens, end), starts)  # of each window; an end token is of what it ends
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
        """The clients of a round, in order: `count` of those that have text, or all."""
        if count is None:
            return self.known
        return sorted(drawn(self.seed, ROUND, round).permutation(self.known)[:count].tolist())

    def windows(self, client: int, positions: np.ndarray) -> np.ndarray:
        """Numbers of the text's windows at these positions of a client."""
        epochs, places = np.divmod(positions, len(self._windows[client]))
        orders = [self._order(client, int(epoch))[places[epochs == epoch]] for epoch in np.unique(epochs)]
        return np.concatenate([np.empty(0, np.int64), *orders])


def owners(sizes: np.ndarray, shares: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
    """The client of each document. sizes: windows that begin in it; shares: of each client, they sum to 1."""
    owner, got = np.zeros(len(sizes), np.int64), np.zeros(len(shares))
    with np.errstate(divide="ignore"):  # a share may be 0 to the last digit
        for document in draw.permutation(np.flatnonzero(sizes)):
            owner[document] = client = int(np.argmin((got + sizes[document]) / shares))
            got[client] += sizes[document]
    return owner


def drawn(seed: int, *key: int) -> np.random.RandomState:
    return frozen(np.random.SeedSequence(seed, spawn_key=key))


def frozen(seeds: np.random.SeedSequence) -> np.random.RandomState:
    """RandomState, whose stream NumPy has frozen (NEP 19): a run resumed under another NumPy reads on in the same
    order, which Generator does not promise."""
    return np.random.RandomState(np.random.MT19937(seeds))


def _ends(tokens: np.ndarray, end: int | None) -> np.ndarray:
    """Where documents end, in order."""
    if end is None:
        return np.empty(0, np.int64)
    parts = [np.flatnonzero(tokens[at : at + SCAN] == end) + at for at in range(0, len(tokens), SCAN)]
    return np.concatenate([np.empty(0, np.int64), *parts])
