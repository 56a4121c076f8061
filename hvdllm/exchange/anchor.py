"""The anchor: the weights that all groups shared last, and the meetings in which it moves.

    d = mean of (anchor - x);  anchor = Outer(anchor, d);  x = anchor

The mean is over groups. Group i has t_i tokens a step, its weight, and its delta is normalised by its number of steps
H_i (FedNova, Wang et al., 2020, arXiv 2007.07481), so that groups of different speed may take different numbers of
steps and the fixed point stays that of the objective:

    d = (sum t_i H_i / sum t_i) (sum t_i (anchor - x_i) / H_i) / sum t_i

With equal H_i this is the mean weighted by tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Wire
from hvdllm.exchange.meta import MetaSum
from hvdllm.exchange.outer import Outer
from hvdllm.flat import Bucket, Flat
from hvdllm.world.base import Flight


@dataclass
class Fragment:
    """Buckets that meet together, neighbours in the flat vector. tokens, steps: of this group since they last met."""

    buckets: list[Bucket]
    tokens: int = 0
    steps: int = 0


@dataclass
class Sent:
    """Deltas on their way. weight, steps: what this group's meta says of them (MetaSum)."""

    flights: list[Flight]
    weight: float
    steps: float


class Anchor:
    """x, state: the shared weights, and the vectors of the outer optimizer; both are needed at meetings alone.

    tokens: committed tokens that the anchor is of
    buffer: the gradient vector in which deltas travel. Where there is only one it is zero between two steps
    """

    def __init__(self, settings: exchanges.LocalSteps, nominal: int, outer: Outer, flat: Flat, wire: Wire) -> None:
        self.settings, self.nominal, self.outer, self.flat, self.wire = settings, nominal, outer, flat, wire
        self.tokens = 0
        self.buffer = flat.gradients[-1]
        self.x = self._new()
        self.x.copy_(flat.x)
        self.state = {name: self._new().fill_(value) for name, value in outer.vectors.items()}

    def _new(self) -> torch.Tensor:
        if self.settings.host_memory and self.flat.x.is_cuda:
            return torch.zeros(self.flat.x.shape, dtype=self.flat.x.dtype, pin_memory=True)
        return torch.zeros_like(self.flat.x)

    def launch(self, fragment: Fragment, committed: int) -> Sent:
        """Sends this group's weighted deltas of a fragment, whose tokens and steps count anew from here on."""
        steps = max(fragment.steps, 1)
        weight = fragment.tokens / steps
        # As large as a mean delta times the tokens of a batch, since a wire expects the size of a sum of gradients.
        factor = weight * self.settings.local_steps / steps

        def fill(span: slice, x: torch.Tensor) -> None:
            torch.sub(self.x[span].to(x.device, non_blocking=True), self.flat.x[span], out=x).mul_(factor)

        return self.send(fragment, committed, weight, weight * steps, fill)

    def send(
        self, fragment: Fragment, committed: int, weight: float, steps: float,
        fill: Callable[[slice, torch.Tensor], None] = lambda span, x: None,
    ) -> Sent:  # fmt: skip
        """Sends what the buffer holds of a fragment. fill: is called before with each span and its part of the
        buffer."""
        self.wire.begin(committed, self.outer.rate / self.nominal)
        flights = []
        for bucket in reversed(fragment.buckets):
            span = slice(bucket.span.start, bucket.span.stop)
            fill(span, self.buffer[span])
            flights.append(self.wire.sum(self.buffer[span], f"grad.{bucket.index}"))
        fragment.tokens = fragment.steps = 0
        return Sent(flights, weight, steps)

    def scale(self, meta: MetaSum) -> float:
        """What turns the sum that has arrived into the mean delta."""
        return meta.steps / meta.weight**2 / float(self.settings.local_steps)

    def meet(self, fragment: Fragment, flights: list[Flight], meta: MetaSum, mixing: float = 0.0) -> None:
        """Lands what `launch` sent and steps the anchor, unless nobody has made a step. The weights become anchor +
        mixing (weights - anchor)."""
        for flight in flights:
            flight.land()
        if not meta.weight:
            return
        scale, device = self.scale(meta), self.flat.x.device
        for bucket in fragment.buckets:
            span = slice(bucket.span.start, bucket.span.stop)
            anchor = self.x[span].to(device, non_blocking=True)
            state = {name: vector[span].to(device, non_blocking=True) for name, vector in self.state.items()}
            self.outer.step(anchor, self.buffer[span].mul_(scale), state)
            if anchor.device != self.x.device:
                self.x[span].copy_(anchor, non_blocking=True)
                for name, values in state.items():
                    self.state[name][span].copy_(values, non_blocking=True)
            if mixing:
                self.flat.x[span].lerp_(anchor, 1 - mixing)
            else:
                self.flat.x[span].copy_(anchor)
            self.buffer[span].zero_()
