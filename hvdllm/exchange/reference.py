"""What the two references have in common: a library of its own sums the gradients, where it likes.

They run in the same loop, with the same model, data, update and log, so that what differs is how the gradients meet.
The library owns the gradients: the update reads each parameter's `grad`, tensor by tensor, and asserts at every step
where it lives. Only the last micro-batch of a round is summed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hvdllm.device import Mark
from hvdllm.exchange.base import Batch, Commit, Update, Wire
from hvdllm.exchange.rounds import Counts, Rounds
from hvdllm.world.base import Flight, World


class Reference(Rounds):
    hooks = False
    one_point = False  # a rank's own gradient is gone before its norm could be taken
    divided_by: float = 1.0  # what the library divided the sum by

    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        model = super().attach(model, flat, update, wire, world)
        self.parameters = list(flat.parameters.values())
        self.whole = sum(p.nbytes for p in self.parameters)  # bytes of a sum in full precision
        self.pieces = self.cut(flat.x)
        self._full: Mark | None = None  # when the last gradient of this backward was there
        self._first: Mark | None = None
        self._armed = False

        def seen(_: torch.Tensor) -> None:
            if self._armed:
                self._full = Mark(self.device)
                self._first = self._first or self._full

        for p in self.parameters:
            p.register_post_accumulate_grad_hook(seen)
        return model

    def spans(self) -> list[Any]:
        spans: list[Any] = self.flat.tensors()
        return spans

    def arm(self, batch: Batch) -> None:
        self._armed, self._full, self._first = batch.last, None, None

    def send(self, bucket: Any) -> Flight:
        raise NotImplementedError("the library sends")

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        self._loss += loss
        self._own += batch.tokens
        self._micro_batches += 1
        if not batch.last:
            return None
        # The library may have waited inside the backward: compute was over when the last gradient was there.
        self._wait = self._full or Mark(self.device)
        self._stream_round = batch.round
        self.finish()
        meta = self.heard()
        landed = Mark(self.device)
        gradients = [p.grad for p in self.parameters]
        self.check(gradients)
        counts = self.counts(meta.tokens)
        divisor = Counts(counts.tokens / self.divided_by, counts.committed)
        lr, norm = self.update.step(self.pieces, [g.view(-1) for g in gradients if g is not None], divisor, self.total)
        torch._foreach_zero_([g for g in gradients if g is not None])
        self.computed([(self._wait, landed)], [(self._first or self._wait, landed)])
        commit = self.commit(meta.tokens, lr, norm, [self.round], [batch.round])
        self.round += 1
        return commit

    def finish(self) -> None:
        """Waits for the library's sums."""

    def check(self, gradients: list[torch.Tensor | None]) -> None:
        """Raises AssertionError where a gradient does not live where the library keeps it."""
        raise NotImplementedError

    def in_flat(self, gradient: torch.Tensor | None) -> bool:
        """Does it live in the map's gradient vector?"""
        assert gradient is not None, "a parameter has no gradient"
        g = self.flat.g
        inside: bool = g.data_ptr() <= gradient.data_ptr() < g.data_ptr() + g.nbytes
        return inside
