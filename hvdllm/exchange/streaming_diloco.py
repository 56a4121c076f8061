"""Streaming DiLoCo: the model meets in K parts, one after the other, while training goes on (Douillard et al., 2025,
arXiv 2501.18512).

    part p is sent after local step h where h mod H = p H / K (so its first round is shorter):  d_p = mean (anchor - x)
    τ steps later it is joined:  anchor_p = Outer(anchor_p, d_p);  x_p = (1 - α) anchor_p + α x_p

Invariant: K = 1, τ = 0, α = 0 is DiLoCo; with α = 1 the weights never hear of the anchors. Only one part travels at a
time, in the same order on every rank, so τ < H / K. A mark is where a part is joined; its meta was posted with it.

Bytes: the peak is that of DiLoCo / K, in K times as many meetings; the average is the same. Nobody waits for the
network where a part arrives within τ steps. Memory: as DiLoCo, and a vector for what travels. Settling joins what flies
and then lets every part meet once more, so that the weights to keep have all steps.

More in hvdllm/exchange/README.md, `streaming_diloco`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from hvdllm.device import Mark
from hvdllm.errors import UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.anchor import Fragment
from hvdllm.exchange.base import Commit, State, Values
from hvdllm.exchange.local import LocalSteps, Meetings, Pulse, Replica
from hvdllm.exchange.meta import MetaSum
from hvdllm.exchange.outer import Nesterov
from hvdllm.flat import Bucket, Flat
from hvdllm.world.base import Flight


@dataclass
class Air:
    """A part on its way. step: the local step after which it was sent; tokens: of this group, which its pulse tells."""

    number: int
    step: int
    tokens: int
    flights: list[Flight]
    launched: Mark
    pulse: Pulse


class InParts:
    """Meetings of one part after the other."""

    def __init__(self, replica: Replica, settings: exchanges.StreamingDiLoCo) -> None:
        self.replica, self.settings = replica, settings
        self._air: Air | None = None
        self._done = 0  # local steps

    def stepped(self) -> Commit | None:
        self._done += 1
        commit = None
        if self._air is not None and self._done == self._air.step + self.settings.delay:
            commit = self._join()
        every, count = self.settings.local_steps, len(self.replica.fragments)
        for number in range(count):
            if self._done % every == number * every // count:
                self._send(number)
                if self.settings.delay == 0:
                    commit = self._join()
        return commit

    def _send(self, number: int) -> None:
        replica = self.replica
        tokens, launched = replica.tally.own.tokens, Mark(replica.device)
        sent = replica.send(replica.fragments[number])
        self._air = Air(number, self._done, tokens, sent.flights, launched, replica.post(True, sent))

    def _join(self) -> Commit:
        replica, wait = self.replica, Mark(self.replica.device)
        air, meta = self._land()
        replica.stood_still(wait, air.launched)
        group = replica.group
        group.base, group.open = replica.tally.tokens + int(meta.tokens), group.open - air.tokens
        replica.anchor.tokens = group.base
        return replica.commit(meta)

    def _land(self) -> tuple[Air, MetaSum]:
        assert self._air is not None
        air, self._air = self._air, None
        meta = self.replica.hear(air.pulse)
        part = self.replica.fragments[air.number]
        self.replica.anchor.meet(part, air.flights, meta, mixing=self.settings.mixing)
        return air, meta

    def meet_last(self) -> tuple[MetaSum, ...]:
        replica = self.replica
        metas = [self._land()[1]] if self._air is not None else []
        for part in replica.fragments:
            sent = replica.send(part)
            metas.append(replica.hear(replica.post(True, sent)))
            replica.anchor.meet(part, sent.flights, metas[-1])
        replica.anchor.flat.x.copy_(replica.anchor.x)
        return tuple(metas)

    # ------------------------------------------------------------------ checkpoint
    def values(self) -> Values:
        air = self._air
        if air is None:
            return {"done": self._done, "air": None}
        for flight in air.flights:
            flight.land()
        return {"done": self._done, "air": [air.number, air.step, asdict(air.pulse.meta.land())]}

    def mine(self) -> Values:
        return {"said": self._air.tokens if self._air is not None else 0}

    def vectors(self) -> dict[str, torch.Tensor]:
        return {"air": self.replica.anchor.buffer} if self._air is not None else {}

    def load(self, state: State, mine: Values | None) -> None:
        self._done, air = state.shared["done"], state.shared["air"]
        if air is None:
            return
        number, step, values = air
        meta = MetaSum.of(values)
        if mine is None:  # the deltas count, but the tokens were lost with the local steps of the other parts
            meta = replace(meta, tokens=0.0, slots={name: [0.0] * self.replica.world.size for name in meta.slots})
        self.replica.anchor.buffer.copy_(state.sharded["air"])
        said = mine["said"] if mine is not None else 0
        self._air = Air(number, step, said, [], Mark(self.replica.device), Pulse.arrived(asdict(meta), True))


class StreamingDiLoCo(LocalSteps[exchanges.StreamingDiLoCo]):
    def __init__(self, settings: exchanges.StreamingDiLoCo, nominal: int) -> None:
        super().__init__(settings, nominal, Nesterov(settings.outer_lr, settings.outer_momentum))

    def arrange(self, replica: Replica) -> Meetings:
        return InParts(replica, self.settings)

    def divide(self, flat: Flat) -> list[Fragment]:
        """Neighbouring buckets, so that the parts are about equally large."""
        count, buckets = self.settings.fragments, flat.buckets
        if len(buckets) < count:
            raise UserError(
                f"exchange.fragments={count}: this model has {len(buckets)} buckets to make parts of; give fewer "
                "fragments, or a smaller exchange.bucket_mb"
            )
        parts: list[list[Bucket]] = [[]]
        end = buckets[-1].span.stop
        for index, bucket in enumerate(buckets):
            left, missing = len(buckets) - index, count - len(parts)
            full = bucket.span.start >= end * len(parts) / count
            if parts[-1] and missing and (full or left <= missing):
                parts.append([])
            parts[-1].append(bucket)
        return [Fragment(each) for each in parts]
