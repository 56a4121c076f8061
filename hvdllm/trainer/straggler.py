"""Does one rank keep the others waiting? From what each rank computed and stood still in each `commit` record; pure.

A collective equalises what comes after it, so ranks are told apart by what they did before. In one record the others
waited for a rank if it computed longer than the median of the others by MARGIN, and they stood still longer than it
did, by at least half of that: what the network takes blocks all alike. Where nobody waits for anybody (timed halves,
local steps by speed, asynchronous servers) a slow rank computes as long as the others, or nobody stands still for it.

It delays them persistently where that is so in SHARE of the last RECORDS, and where the share by which it computes
longer is above MARGIN by ERRORS standard errors of its mean over them; and no longer, once the first is so in 1 - SHARE
of them at most. Equal ranks with short steps pass the first test often (of two one is always the slower, by chance in
6 of 9 records one time in four) and the second hardly ever: of 200 simulated runs of 1,000 records with log-normal
noise of 10 % or 30 % none did, of 200 with 100 % one. A rank that is twice as slow is named after 6 records at 10 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median, stdev

MARGIN = 0.2
RECORDS = 9
SHARE = 2 / 3
ERRORS = 6.0


def waited_for(compute_s: Sequence[float], blocked_s: Sequence[float]) -> int | None:
    """The rank that the others waited for; seconds of each rank in one record."""
    if len(compute_s) < 2:
        return None
    slowest = max(range(len(compute_s)), key=compute_s.__getitem__)
    usual, stood = (median(x for rank, x in enumerate(each) if rank != slowest) for each in (compute_s, blocked_s))
    longer = compute_s[slowest] - usual
    waited = stood - blocked_s[slowest] >= longer / 2
    return slowest if usual > 0 and longer > MARGIN * usual and waited else None


def excess(compute_s: Sequence[float]) -> list[float]:
    """By what share each rank computed longer than the median of the others; 0 where they did not compute."""
    out = []
    for rank, own in enumerate(compute_s):
        usual = median([x for other, x in enumerate(compute_s) if other != rank] or [own])
        out.append(own / usual - 1 if usual > 0 else 0.0)
    return out


def certain(shares: Sequence[float]) -> bool:
    """Is their mean above MARGIN beyond the noise?"""
    return len(shares) > 1 and fmean(shares) - ERRORS * stdev(shares) / math.sqrt(len(shares)) > MARGIN


@dataclass
class Straggler:
    """seen: whom the others waited for, of the last records; longer: the excess of each rank in them. named: who was
    said to delay them, if anybody."""

    seen: list[int | None] = field(default_factory=list)
    named: int | None = None
    longer: list[list[float]] = field(default_factory=list)

    def note(self, compute_s: Sequence[float], blocked_s: Sequence[float]) -> str | None:
        """Takes a record in. A sentence where another rank delays the others than before, or none any more."""
        rank = waited_for(compute_s, blocked_s)
        self.seen = [*self.seen, rank][-RECORDS:]
        self.longer = [each for each in (*self.longer, excess(compute_s)) if len(each) == len(compute_s)][-RECORDS:]
        enough = math.ceil(SHARE * RECORDS)
        often = rank is not None and rank != self.named and self.seen.count(rank) >= enough
        if often and rank is not None and certain([each[rank] for each in self.longer]):
            self.named = rank
            usual = median(seconds for other, seconds in enumerate(compute_s) if other != rank)
            return (
                f"rank {rank} delays the others: it computes {compute_s[rank] / usual:.1f} times as long as they do, "
                f"and they waited for it in {self.seen.count(rank)} of the last {len(self.seen)} records"
            )
        if self.named is not None and len(self.seen) - self.seen.count(self.named) >= enough:
            rank, self.named = self.named, None
            return f"rank {rank} no longer delays the others"
        return None
