"""`meta`: the numbers of a round that must be exact, as one float64 vector on the CPU with an operation of its own.

In a bucket of gradients they would not be exact: fp32 counts only up to 2^24, a reduce-scatter would land them on one
rank, and a lossy wire would round them. A meta is posted when a round begins, with the tokens of this round and what
is known of the round before, and heard when the round ends. Each rank has a slot for its own seconds and leaves the
other slots at zero, so that the sum also gathers them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hvdllm.exchange.base import Values
from hvdllm.world.base import Asks, Flight, World

FIELDS = ("tokens", "loss", "loss_tokens", "squares", "stop", "save", "bad", "weight", "steps")
SLOT = ("compute_s", "blocked_s", "flight_s", "cpu_s", "micro_batches")


@dataclass(frozen=True)
class MetaSum:
    """What all ranks posted, added up.

    squares: the squared norms of the ranks' own sums, each divided by the rank's tokens
    slots: for each field of SLOT, one number a rank
    bad: how many ranks have masked a local step, which no other rank can see
    weight: the weights of what travels with it, where sums are not weighted by tokens alone
    steps: the same weights times local steps
    """

    tokens: float
    loss: float
    loss_tokens: float
    squares: float
    asks: Asks
    slots: dict[str, list[float]]
    bad: float = 0.0
    weight: float = 0.0
    steps: float = 0.0

    @staticmethod
    def of(values: Values) -> MetaSum:
        """From a checkpoint's plain values, those of asdict()."""
        return MetaSum(**{**values, "asks": Asks(**values["asks"])})


class MetaPost:
    """One meta in flight.

    values: those of FIELDS that are not 0. What this rank itself was asked is taken along, beside the asks of other
      ranks that `values` passes on
    slot: this rank's numbers of SLOT
    """

    def __init__(self, world: World, parity: int, values: dict[str, float], slot: dict[str, float]) -> None:
        asks = world.asks.take()
        fixed = {**dict.fromkeys(FIELDS, 0.0), **values}
        fixed |= {"stop": fixed["stop"] + asks.stop, "save": fixed["save"] + asks.save}
        vector = torch.zeros(len(FIELDS) + len(SLOT) * world.size, dtype=torch.float64)
        vector[: len(FIELDS)] = torch.tensor([fixed[name] for name in FIELDS], dtype=torch.float64)
        begin = len(FIELDS) + len(SLOT) * world.rank
        vector[begin : begin + len(SLOT)] = torch.tensor([slot[name] for name in SLOT], dtype=torch.float64)
        self.flight: Flight = world.sum(vector, f"meta.{parity}")

    def land(self) -> MetaSum:
        values = self.flight.land().tolist()
        head, rest = dict(zip(FIELDS, values, strict=False)), values[len(FIELDS) :]
        return MetaSum(
            asks=Asks(head.pop("stop") > 0, head.pop("save") > 0),
            slots={name: rest[i :: len(SLOT)] for i, name in enumerate(SLOT)}, **head,
        )  # fmt: skip


class Metas:
    """Posts the metas of a world one after the other, under two names in turn: the next one may be posted before the
    last has landed."""

    def __init__(self, world: World) -> None:
        self.world, self._parity = world, 0

    def post(self, values: dict[str, float], slot: dict[str, float]) -> MetaPost:
        self._parity = 1 - self._parity
        return MetaPost(self.world, self._parity, values, slot)
