"""Reference: torch's DistributedDataParallel (Li et al., 2020, arXiv 2006.15704), tuned as its users would.

Invariant: as exact as all-reduce; replicas are bit-equal. Gradients are views of DDP's buckets, which travel during the
last backward (no_sync before); fused optimizer; torch's own communication hooks for the wires fp16, bf16 and powersgd
(which keep residuals of their own: a resumed run with powersgd begins with empty ones). DDP divides by the number of
ranks.

It runs without Horovod in the process, on world=torch.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from hvdllm.config import schema
from hvdllm.device import Mark
from hvdllm.exchange.base import Batch, Stream, Update, Wire
from hvdllm.exchange.reference import Reference
from hvdllm.world.base import World


class Ddp(Reference):
    def attach(self, model: nn.Module, flat: Any, update: Update, wire: Wire, world: World) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        super().attach(model, flat, update, wire, world)
        self.divided_by = float(world.size)
        for p in self.parameters:
            p.grad = None  # DDP makes its own
        self.module = DistributedDataParallel(
            model, bucket_cap_mb=_bucket_mb(self.settings, wire.settings, flat.x.nbytes),  # type: ignore[attr-defined]
            gradient_as_bucket_view=True, forward_sync_buffers=False, init_sync=False,
        )  # fmt: skip
        self._bytes, self._power = _hook(self.module, wire.settings, self.parameters, self.nominal)  # type: ignore[attr-defined]
        self._rebuilt = False
        return self.module

    def feed(self, stream: Stream) -> Iterator[Batch]:
        for batch in super().feed(stream):
            if not self._rebuilt:
                self._rebuild(batch)
            # Only a backward outside of no_sync() sends anything.
            with nullcontext() if batch.last else self.module.no_sync():
                yield batch

    def _rebuild(self, batch: Batch) -> None:
        """DDP lays its buckets out anew after the first backward that it sums. One that counts for nothing brings that
        about, so that a resumed run adds up in the same order."""
        self._rebuilt = True
        self._armed = False
        self.module(batch.inputs, batch.targets, (batch.round, batch.index)).backward()
        with self.module.no_sync():  # the forward is where buckets are laid out
            self.module(batch.inputs, batch.targets, (batch.round, batch.index)).backward()
        for p in self.parameters:
            assert p.grad is not None
            p.grad.zero_()
        if self._power is not None:  # it counts sums, from the run's first one on
            self._power.iter = self.step
            for kept in (self._power.error_dict, self._power.p_memory_dict, self._power.q_memory_dict):
                kept.clear()
        self.arm(batch)
        self._begin, self._cpu = Mark(self.device), time.process_time()  # not this round's compute

    def finish(self) -> None:
        # The state has counted this sum already.
        exact = self._power is not None and self._power.iter <= self._power.start_powerSGD_iter
        self.world.bytes_sent += 2 * (self.world.size - 1) / self.world.size * (self.whole if exact else self._bytes)

    def check(self, gradients: list[torch.Tensor | None]) -> None:
        assert not any(self.in_flat(g) for g in gradients), "DDP's gradients are views of its buckets"


def _bucket_mb(exchange: Any, wire: Any, size: int) -> float:
    """PowerSGD's hook goes on from callbacks, which Gloo runs in any order: with two buckets ranks would wait for each
    other for ever, so everything is one."""
    if isinstance(wire, schema.PowerSGD):
        return 2 * size / 2**20 + 1
    return float(exchange.bucket_mb or max(1.0, min(25.0, size / 2**23)))


def _hook(module: Any, wire: Any, parameters: list[Any], nominal: int) -> tuple[float, Any]:
    """Registers torch's hook for a wire; the bytes that a sum has, and PowerSGD's state."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

    whole = float(sum(p.nbytes for p in parameters))
    if isinstance(wire, schema.Fp16):
        module.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return whole / 2, None
    if isinstance(wire, schema.Bf16):
        # By a name of its own: torch refuses its hook but with NCCL, though Gloo adds bfloat16 as well.
        module.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket))
        return whole / 2, None
    if isinstance(wire, schema.PowerSGD):
        state = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=wire.rank,
            start_powerSGD_iter=max(2, wire.warmup_tokens // nominal), min_compression_rate=wire.min_compression,
        )  # fmt: skip
        module.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        return float(sum(_power_bytes(p, wire) for p in parameters)), state
    return whole, None


def _power_bytes(p: torch.Tensor, wire: Any) -> int:
    """What torch's hook sends of one gradient: its two thin factors where they are small enough, else all of it."""
    rows = p.shape[0] if p.dim() > 1 else 1
    columns = p.numel() // rows
    thin = (rows + columns) * wire.rank
    return thin * p.element_size() if p.dim() > 1 and thin * wire.min_compression < p.numel() else p.nbytes
