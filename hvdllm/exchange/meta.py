"""`meta`: the numbers of a round that must be exact, as one float64 CPU vector and an operation of its own.

In a bucket they would not be: fp32 counts are exact only to 2^24, a reduce-scatter would land them on one
rank, a lossy wire would bend them. Posted when a round begins, with this round's tokens and what is known of
the round before; awaited when the round ends. Each rank's slot holds its own seconds and zeros elsewhere, so
the sum is also a gather.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hvdllm.world.base import Asks, Flight, World

FIELDS = ("tokens", "loss", "loss_tokens", "squares", "stop", "save", "bad", "weight", "steps")
SLOT = ("compute_s", "blocked_s", "flight_s", "cpu_s", "micro_batches")


@dataclass(frozen=True)
class MetaSum:
    """What all ranks said: sums, and one list of rank values for each field of SLOT."""

    tokens: float
    loss: float
    loss_tokens: float
    squares: float  # each rank's squared norm of its own sum over its own tokens, added up
    asks: Asks
    slots: dict[str, list[float]]
    bad: float = 0.0  # ranks that have masked a local step, which nobody else can see
    weight: float = 0.0  # of what travels with it, where sums are weighted by more than tokens
    steps: float = 0.0  # weight times local steps

    @staticmethod
    def of(values: dict[str, Any]) -> MetaSum:
        """From a checkpoint's plain values, those of asdict()."""
        return MetaSum(**{**values, "asks": Asks(**values["asks"])})


class MetaPost:
    """One meta in flight. values: of FIELDS, those that are not 0; asks of this rank are taken along, beside what
    `values` passes on of others'."""

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
            head["tokens"],
            head["loss"],
            head["loss_tokens"],
            head["squares"],
            Asks(head["stop"] > 0, head["save"] > 0),
            {name: rest[i :: len(SLOT)] for i, name in enumerate(SLOT)},
            head["bad"],
            head["weight"],
            head["steps"],
        )
