"""How much of the validation text also occurs in the training text, measured by runs of RUN tokens.

Whole documents are held out by a hash of their content. What two different documents share (a licence, a copied
function, another edition of a book) may therefore be on both sides, and a low loss on it shows memory, not learning.
Runs are compared by a 64-bit polynomial hash, by which a false match is practically impossible. The training text is
read once, in blocks, in a few threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

RUN = 50  # tokens
MOST = 4_000_000  # tokens of validation text that are looked for; an evaluation reads a prefix of it
BLOCK = 2**17  # tokens of training text at a time; what is computed of them stays in a core's cache
THREADS = 8  # at most
BITS = 26  # at most, of a hash, by which nearly all that is not looked for is told apart at once
BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that it has an inverse modulo 2^64


def repeated(train: np.ndarray | Sequence[np.ndarray], validation: np.ndarray) -> np.ndarray:
    """Which runs of the validation text occur in the training text, or in one of several, bool [places].

    A place is one at which RUN tokens begin, among the first MOST tokens. The result is empty if the validation text is
    shorter than a run.
    """
    wanted = _hashes(validation[:MOST])
    if not len(wanted):
        return np.zeros(0, dtype=bool)
    known, places = np.unique(wanted, return_inverse=True)
    shift = np.uint64(64 - min(BITS, len(known).bit_length() + 5))
    some = np.zeros(2 ** (64 - int(shift)), dtype=bool)
    some[known >> shift] = True
    found = np.zeros(len(known), dtype=bool)

    def look(place: tuple[np.ndarray, int]) -> None:
        train, at = place
        here = _hashes(train[at : at + BLOCK + RUN - 1])
        here = here[some[here >> shift]]
        nearest = np.searchsorted(known, here).clip(max=len(known) - 1)
        found[nearest[known[nearest] == here]] = True  # threads only ever write True

    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as threads:
        texts = [train] if isinstance(train, np.ndarray) else train
        for _ in threads.map(look, ((each, at) for each in texts for at in range(0, len(each) - RUN + 1, BLOCK))):
            pass  # what a thread raises is raised here
    return found[places]


def share(seen: np.ndarray, context: int, windows: int) -> float:
    """The share of evaluated windows that contain a run which the training text has too.

    Args:
        seen: what repeated() returned.
        context: tokens in a window, without the last target.
        windows: how many windows, from the first on, are evaluated.
    """
    begins = np.arange(windows) * context
    last = begins + max(1, context + 2 - RUN)  # a window shorter than a run counts the run that begins with it
    sums = np.concatenate([[0], np.cumsum(seen)])
    inside = begins < len(seen)
    if not inside.any():
        return 0.0
    hits = sums[last[inside].clip(max=len(seen))] - sums[begins[inside]]
    return float((hits > 0).mean())


def _hashes(tokens: np.ndarray) -> np.ndarray:
    """The hash of each run of RUN tokens, uint64 [places]."""
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
