"""Reference: Horovod's stock DistributedOptimizer (Sergeev and Del Balso, 2018, arXiv 1802.05799).

Invariant: as exact as all-reduce; replicas are bit-equal. Horovod's hooks launch one operation for each parameter
during the last backward, and Horovod fuses them as they come, by its own defaults instead of our buckets. Its
`synchronize` waits by spinning. Only its sums are used: clipping, learning rate and optimizer are ours. With wire=fp16
it casts the gradients without a scale, so that a large sum overflows and stops the run.

More in hvdllm/exchange/README.md, `horovod`.
"""

from __future__ import annotations

import torch
from torch import nn

from hvdllm import pulse
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Batch, Update, Wire
from hvdllm.exchange.reference import Reference
from hvdllm.exchange.wire import parts as wires
from hvdllm.flat import Flat
from hvdllm.world.base import World

NEVER = 2**30


class Horovod(Reference[exchanges.Horovod]):
    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        super().attach(model, flat, update, wire, world)
        self._half = isinstance(self.wire_settings, wires.Fp16)
        optimizer = torch.optim.SGD(self.parameters, lr=0.0)  # it never steps
        named = list(flat.parameters.items())
        self.optimizer = world.distributed_optimizer(optimizer, named, "fp16" if self._half else "none")  # type: ignore[attr-defined]
        self._bytes = self.whole / (2 if self._half else 1)
        return model

    def arm(self, batch: Batch) -> None:
        super().arm(batch)
        self.optimizer.set_backward_passes_per_step(1 if batch.last else NEVER)

    def disarm(self) -> None:
        self.optimizer.set_backward_passes_per_step(NEVER)

    def wait(self) -> None:
        with pulse.waiting("the sums of Horovod's optimizer"):
            self.optimizer.synchronize()
        self.world.bytes_sent += 2 * (self.world.size - 1) / self.world.size * self._bytes

    def check(self, gradients: list[torch.Tensor]) -> None:
        inside = [self.in_flat(g) for g in gradients]
        moved = self._half and self.world.size > 1  # alone Horovod does nothing
        assert not any(inside) if moved else all(inside), "Horovod sums in place, but decodes fp16 into new memory"
