"""The prequential loss of a stream: that of each batch before it is learnt (Dawid, 1984; test, then train).

Each rank adds up its losses on the device, without a host read. At a mark with a `commit` record the sums begin their
way to the host, at the next mark that to the other ranks, and at the next mark with a record they have arrived. No rank
waits for another there. All ranks then know the same numbers, and the earlier record is written with them (ledger.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from hvdllm.device import Later
from hvdllm.online.drift import Drift
from hvdllm.plain import Json
from hvdllm.world.base import Flight, World


@dataclass
class Sums:
    """Losses in nats, tokens, and bytes of text that these stand for."""

    loss: float = 0.0
    tokens: float = 0.0
    bytes: float = 0.0

    def add(self, other: Sums, keep: float = 1.0) -> None:
        """Adds sums, after keeping only a share of the old ones."""
        self.loss, self.tokens = self.loss * keep + other.loss, self.tokens * keep + other.tokens
        self.bytes = self.bytes * keep + other.bytes

    @property
    def nats(self) -> float | None:
        """The mean loss in nats a token."""
        return self.loss / self.tokens if self.tokens else None

    @property
    def bits(self) -> float | None:
        """The same in bits per byte of text."""
        return self.loss / math.log(2) / self.bytes if self.bytes else None


class Prequential:
    """The prequential loss of a run.

    Args:
        world: the ranks.
        window: tokens over which the recent loss is averaged; 0 if the run trains on no stream.

    Attributes:
        last: since the `commit` record before.
        recent: with weights that fall by a factor of e over `window` tokens.
        whole: since the beginning of the run.
        drift: the test for a change of the stream.
        drifted: is called where it has changed, and says in words what was done.
        untested: the loss of the last record, until the test has seen it.
    """

    def __init__(self, world: World, window: int) -> None:
        self.world, self.window = world, window
        self.last, self.recent, self.whole = Sums(), Sums(), Sums()
        self.drift = Drift()
        self.drifted: Callable[[int], str] = lambda tokens: ""
        self.untested: float | None = None
        self._loss: torch.Tensor | None = None
        self._open = Sums()  # of this rank since the last mark with a record
        self._posted: tuple[Later, Sums] | None = None
        self._flight: Flight | None = None
        self._parity = 0

    def saw(self, fresh: int, tokens: int, loss: torch.Tensor) -> None:
        """Counts a micro-batch. fresh: bytes that it brought for the first time, or 0."""
        if not fresh or not self.window:
            return
        loss = loss.detach().double()  # which may be the caller's own, and is not changed
        self._loss = loss if self._loss is None else self._loss.to(loss.device) + loss
        self._open.tokens += tokens
        self._open.bytes += fresh

    def post(self) -> None:
        """Begins to send what this rank has added up since the last call. Every rank calls it at the same marks, after
        land()."""
        if not self.window:
            return
        loss = torch.zeros(1, dtype=torch.float64) if self._loss is None else self._loss.reshape(1)
        self._posted, self._open, self._loss = (Later(loss), self._open), Sums(), None

    def send(self) -> None:
        """Sends what was posted at an earlier mark. Every rank calls it at every mark."""
        if self._posted is None:
            return
        (later, sums), self._posted = self._posted, None
        vector = torch.tensor([later.read()[0], sums.tokens, sums.bytes], dtype=torch.float64)
        self._parity = 1 - self._parity
        self._flight = self.world.sum(vector, f"prequential.{self._parity}")

    def land(self) -> None:
        """Adds what was posted to the sums of all ranks. Every rank calls it at the same marks."""
        self.send()
        if self._flight is None:
            return
        loss, tokens, size = self._flight.land().tolist()
        self._flight, self.last = None, Sums(loss, tokens, size)
        self.whole.add(self.last)
        self.recent.add(self.last, math.exp(-tokens / self.window))

    def values(self) -> Json:
        """What a `commit` record says of it; {} if the run trains on no stream."""
        if not self.window:
            return {}
        return {
            "prequential": self.last.nats,
            "prequential_bits_per_byte": self.last.bits,
            "prequential_recent": self.recent.nats,
            "prequential_recent_bits_per_byte": self.recent.bits,
            "prequential_whole": self.whole.nats,
            "prequential_whole_bits_per_byte": self.whole.bits,
        }

    # ------------------------------------------------------------------ checkpoint
    def state(self) -> Json:
        """Plain values that are equal on all ranks. Collective."""
        if not self.window:
            return {}
        self.land()
        loss = 0.0 if self._loss is None else float(self._loss.item())
        vector = torch.tensor([loss, self._open.tokens, self._open.bytes], dtype=torch.float64)
        left = self.world.gather(vector, "prequential.state").land().reshape(-1, 3).tolist()
        return {"last": asdict(self.last), "recent": asdict(self.recent), "whole": asdict(self.whole), "open": left}

    def load(self, state: Json) -> None:
        """The inverse of `state`. What was open counts on the ranks where it was, so that it is added up in the same
        order, or on rank 0 if they are not as many. Raises ValueError for values that are no numbers."""
        if not state or not self.window:
            return
        self.last, self.recent, self.whole = (Sums(**state[name]) for name in ("last", "recent", "whole"))
        opened = [Sums(*each) for each in state["open"]]
        sums = (self.last, self.recent, self.whole, *opened)
        if not all(isinstance(value, int | float) for each in sums for value in asdict(each).values()):
            raise ValueError("the prequential loss is not said in the form of this version")
        if len(opened) == self.world.size:
            own = opened[self.world.rank]
        else:
            own = Sums()
            for each in opened if self.world.rank == 0 else ():
                own.add(each)
        if own.tokens:
            self._open = Sums(0.0, own.tokens, own.bytes)
            self._loss = torch.tensor(own.loss, dtype=torch.float64)
