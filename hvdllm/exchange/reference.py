"""What the two references have in common: a library of its own sums the gradients, in memory of its choice.

They run in the same loop, with the same model, data, update and log, so that only the way the gradients meet differs.
The library owns the gradients: the update reads the `grad` of each parameter, tensor by tensor, and asserts at every
step where it lives. Only the last micro-batch of a round is summed, unless a library is asked for more.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from hvdllm import pulse, registry
from hvdllm.device import Mark
from hvdllm.errors import UserError
from hvdllm.exchange.base import Batch, Commit, Update, Wire
from hvdllm.exchange.buckets import after_gradient
from hvdllm.exchange.common import S
from hvdllm.exchange.rounds import Rounds
from hvdllm.exchange.tally import Interval
from hvdllm.exchange.wire import parts as wires
from hvdllm.exchange.wire.plain import Plain
from hvdllm.flat import Bucket, Flat, Span
from hvdllm.world.base import Flight, World


class Reference(Rounds[S]):
    """divided_by: what the library divides its sums by."""

    hooks = False
    one_point = False  # a rank's own gradient is gone before its norm could be taken
    divided_by = 1.0

    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        """The library sums by itself and reads only the settings of a wire, so the wire has to be a Plain one, which
        holds them. Raises UserError where the library has no such wire of its own."""
        if type(wire) is not Plain:
            raise TypeError(
                f"{type(self).__name__} sums by itself: make it with a Plain wire, not {type(wire).__name__}"
            )
        self.wire_settings = wire.settings or wires.Fp32()
        exchange = registry.of("exchange", self.settings)
        known = [name for name, part in registry.parts("wire").items() if exchange.facts.carries in part.facts.carries]
        name = registry.name_of("wire", self.wire_settings)
        if name not in known or self.wire_settings.hierarchical:
            raise UserError(
                f"exchange={exchange.name} sums by a library of its own, which cannot carry wire={name}"
                f"{' with wire.hierarchical=true' * self.wire_settings.hierarchical}: take one of {', '.join(known)}, "
                "or exchange=allreduce"
            )
        model = super().attach(model, flat, update, wire, world)
        self.parameters = list(flat.parameters.values())
        self.whole = sum(p.nbytes for p in self.parameters)  # bytes of a sum in full precision
        self._full: Mark | None = None  # when the last gradient of this backward was there
        self._first: Mark | None = None
        self._armed = False
        self._seen = 0  # gradients of this backward
        self._waits: list[tuple[Interval, Interval]] = []  # blocked and flight of this round's sums before the last

        def seen(_: nn.Parameter) -> None:
            if self._armed:
                self._full = Mark(self.device)
                self._first = self._first or self._full
                self._seen += 1
                if self._seen == len(self.parameters):  # the rest of the backward waits for the library's sums
                    pulse.waits("the sums of its library")

        for p in self.parameters:
            after_gradient(p, seen)
        return model

    def spans(self) -> list[Span]:
        return self.flat.tensors()

    def arm(self, batch: Batch) -> None:
        self._armed, self._full, self._first, self._seen = self.summed(batch), None, None, 0

    def summed(self, batch: Batch) -> bool:
        """Whether the backward of this micro-batch is summed."""
        return batch.last

    def waited(self) -> None:
        """A sum that is not the last one of its round is there: notes since when it travelled, and since when this rank
        has waited for it."""
        landed = Mark(self.device)
        full = self._full or landed
        self._waits.append(((full, landed), (self._first or full, landed)))

    def send(self, bucket: Bucket) -> Flight:
        raise NotImplementedError("the library sends")

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        self.computes(batch, loss)
        if not batch.last:
            return None
        # The library may have waited inside the backward: compute was over when the last gradient was there.
        self.now.wait = self._full or Mark(self.device)
        self.wait()
        meta = self.hear()
        landed = Mark(self.device)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        assert len(gradients) == len(self.parameters), "a parameter has no gradient"
        self.check(gradients)
        divisor = self.divisor(meta.tokens)
        divisor = replace(divisor, tokens=divisor.tokens / self.divided_by)
        lr, norm = self.update.step(self.pieces, [g.view(-1) for g in gradients], divisor, self.total)
        torch._foreach_zero_(gradients)
        self._waits.append(((self.now.wait, landed), (self._first or self.now.wait, landed)))
        self.computed([blocked for blocked, _ in self._waits], [flight for _, flight in self._waits])
        self._waits = []
        commit = self.commit(meta.tokens, lr, norm, [self.tally.round], [batch.round])
        self.tally.round += 1
        return commit

    def wait(self) -> None:
        """Waits for the library's sums and counts their bytes."""
        raise NotImplementedError

    def check(self, gradients: list[torch.Tensor]) -> None:
        """Raises AssertionError where a gradient does not live where the library keeps it."""
        raise NotImplementedError

    def in_flat(self, gradient: torch.Tensor) -> bool:
        """Whether it lives in the flat gradient vector."""
        g = self.flat.g
        return g.data_ptr() <= gradient.data_ptr() < g.data_ptr() + g.nbytes
