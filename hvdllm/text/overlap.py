"""How much of the validation text also stands in the training text, by runs of RUN tokens.

Documents are told apart by a hash of their content, so what two different documents share (a license, a copied
function, an edition of the same book) may be on both sides; a loss on it shows memory, not learning. Runs are compared
by a 64-bit polynomial hash, so a false match is out of the question, and the training text is read once, in blocks.
"""

from __future__ import annotations

import numpy as np

RUN = 50  # tokens
MOST = 4_000_000  # tokens of validation text that are looked for; evaluations read a prefix
BLOCK = 1_000_000  # tokens of training text at a time
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64


def repeated(train: np.ndarray, validation: np.ndarray) -> np.ndarray:
    """For each place of the validation tokens at which RUN of them begin (of the first MOST): do the same RUN stand in
    a row in the training tokens? bool [places], empty where the text is shorter."""
    wanted = _hashes(validation[:MOST])
    if not len(wanted):
        return np.zeros(0, dtype=bool)
    known, places = np.unique(wanted, return_inverse=True)
    found = np.zeros(len(known), dtype=bool)
    for at in range(0, len(train) - RUN + 1, BLOCK):
        here = _hashes(train[at : at + BLOCK + RUN - 1])
        nearest = np.searchsorted(known, here).clip(max=len(known) - 1)
        found[nearest[known[nearest] == here]] = True
    return found[places]


def share(seen: np.ndarray, context: int, windows: int) -> float:
    """Share of the first `windows` evaluated windows of context + 1 tokens that hold a run which is `seen`."""
    begins = np.arange(windows) * context
    last = begins + max(1, context + 2 - RUN)  # a shorter window: the run that begins with it
    sums = np.concatenate([[0], np.cumsum(seen)])
    inside = begins < len(seen)
    if not inside.any():
        return 0.0
    hits = sums[last[inside].clip(max=len(seen))] - sums[begins[inside]]
    return float((hits > 0).mean())


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 [places], one for each run of RUN tokens."""
    count = len(tokens) - RUN + 1
    if count <= 0:
        return np.zeros(0, dtype=np.uint64)
    with np.errstate(over="ignore"):
        mixed = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        powers = np.full(len(tokens), BASE, dtype=np.uint64)
        powers[0] = 1
        powers = np.multiply.accumulate(powers)
        back = np.full(count, np.uint64(pow(int(BASE), -1, 2**64)), dtype=np.uint64)
        back[0] = 1
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.add.accumulate(mixed * powers)])
        hashes: np.ndarray = (sums[RUN:] - sums[:-RUN]) * np.multiply.accumulate(back)
        return hashes
