"""Streaming DiLoCo: the model meets in K parts, one after the other, while training goes on (Douillard et al., 2025,
arXiv 2501.18512).

    part p is sent after local step h where h mod H = p H / K (so its first round is shorter):  d_p = mean (anchor - x)
    τ steps later it is joined:  anchor_p = Outer(anchor_p, d_p);  x_p = (1 - α) anchor_p + α x_p

Invariant: K = 1, τ = 0, α = 0 is DiLoCo; with α = 1 the weights never hear of the anchors. Only one part travels at a
time, in the same order on every rank, so τ < H / K. A mark is a join: its meta was posted with the part.

Peak bytes: those of DiLoCo / K, in K times as many meetings; on average the same. Nothing waits for the network where
a part arrives within τ steps. Memory: as DiLoCo, and a vector for what travels. Settling joins what flies, then lets
every part meet once more, so that the weights to keep have all steps. More in
hvdllm/exchange/README.md, `streaming_diloco`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hvdllm.device import Mark
from hvdllm.errors import UserError
from hvdllm.exchange.base import Commit, State
from hvdllm.exchange.local import Fragment, LocalSteps, Pulse, again
from hvdllm.exchange.meta import MetaSum
from hvdllm.exchange.outer import Momentum
from hvdllm.world.base import Flight


@dataclass
class Air:
    """A part on its way. step: local one after which it was sent. tokens: of this group, said with it."""

    number: int
    step: int
    tokens: int
    flights: list[Flight]
    launched: Mark
    pulse: Pulse


class StreamingDiLoCo(Momentum, LocalSteps):
    copies = 2  # deltas travel while gradients are computed

    def __init__(self, settings: Any, nominal: int) -> None:
        super().__init__(settings, nominal)
        self._air: Air | None = None
        self._done = 0  # local steps

    def cut(self) -> list[Fragment]:
        """Neighbouring buckets, so that the parts are about equally large."""
        count, buckets = self.settings.fragments, self.flat.buckets
        if len(buckets) < count:
            raise UserError(
                f"exchange.fragments={count}: this model has {len(buckets)} buckets to make parts of; give fewer "
                "fragments, or a smaller exchange.bucket_mb"
            )
        parts: list[list[Any]] = [[]]
        end = buckets[-1].span.stop
        for index, bucket in enumerate(buckets):
            left, missing = len(buckets) - index, count - len(parts)
            full = bucket.span.start >= end * len(parts) / count
            if parts[-1] and missing and (full or left <= missing):
                parts.append([])
            parts[-1].append(bucket)
        return [Fragment(each) for each in parts]

    def synchronise(self) -> Commit | None:
        self._done += 1
        commit = None
        if self._air is not None and self._done == self._air.step + self.settings.delay:
            commit = self._join()
        every, count = self.settings.local_steps, len(self.fragments)
        for number in range(count):
            if self._done % every == number * every // count:
                self._send(number)
                if self.settings.delay == 0:
                    commit = self._join()
        return commit

    def _send(self, number: int) -> None:
        tokens, launched = self._now.tokens, Mark(self.device)
        flights, weight, steps = self.launch(self.fragments[number])
        self._air = Air(number, self._done, tokens, flights, launched, self.pulse(True, weight, steps))

    def _join(self) -> Commit:
        wait = Mark(self.device)
        air, meta = self._land_air()
        self.meet(self.fragments[air.number], air.flights, meta, mixing=self.settings.mixing)
        self.blocked(wait, air.launched)
        self._base, self._open = self.tokens + int(meta.tokens), self._open - air.tokens
        self.anchor_tokens = self._base
        return self.commit(meta, staleness=0.0)

    def _land_air(self) -> tuple[Air, MetaSum]:
        assert self._air is not None
        air, self._air = self._air, None
        return air, self.heed(air.pulse)

    def close(self) -> tuple[MetaSum, ...]:
        metas = []
        if self._air is not None:
            air, meta = self._land_air()
            self.meet(self.fragments[air.number], air.flights, meta, mixing=self.settings.mixing)
            metas.append(meta)
        for part in self.fragments:
            flights, weight, steps = self.launch(part)
            metas.append(self.heed(self.pulse(True, weight, steps)))
            self.meet(part, flights, metas[-1])
        self.flat.x.copy_(self.anchor)
        return tuple(metas)

    # ------------------------------------------------------------------ checkpoint
    def values(self) -> dict[str, Any]:
        air = self._air
        if air is None:
            return {"done": self._done, "air": None}
        for flight in air.flights:
            flight.land()
        return {"done": self._done, "air": [air.number, air.step, asdict(air.pulse.meta.land())]}

    def vectors(self) -> dict[str, torch.Tensor]:
        return {"air": self.buffer} if self._air is not None else {}

    def state(self) -> State:
        state = super().state()
        state.mine["said"] = self._air.tokens if self._air is not None else 0
        return state

    def load(self, state: State, mine: list[dict[str, Any]]) -> None:
        super().load(state, mine)
        self._done, air = state.shared["done"], state.shared["air"]
        if air is None:
            return
        number, step, meta = air
        same = len(mine) == self.world.size
        said = mine[self.world.rank]["said"] if same else 0
        values = MetaSum.of(meta)
        if not same:  # their deltas count, their tokens were lost with the local steps of the other parts
            values = replace(values, tokens=0.0, slots={name: [0.0] * self.world.size for name in values.slots})
        self.buffer.copy_(state.sharded["air"])
        self._air = Air(number, step, said, [], Mark(self.device), again(values, True))
