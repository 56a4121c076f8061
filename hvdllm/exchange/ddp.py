"""Reference: torch's DistributedDataParallel (Li et al., 2020, arXiv 2006.15704), tuned as its users would.

Invariant: as exact as all-reduce; replicas are bit-equal. Gradients are views of DDP's buckets, which travel during
the last backward; the backwards before it run under no_sync. The optimizer is our fused one. The wires fp16, bf16 and
powersgd are torch's own communication hooks; the residuals and thin matrices of PowerSGD are part of the checkpoint.
DDP divides its sums by the number of ranks.

exchange.sync=micro_batch leaves no_sync out, as many training scripts do. Each backward is then summed, together with
what has added up before it. It is as exact: DDP's sum of (G + g_i) / N over ranks i is G + (sum of g_i) / N, where G is
the mean that all ranks have already, and G is zero when a round begins. It costs the bytes of a sum for each
micro-batch, and each of them waits. Every rank has to take part in every sum, so a rank with fewer micro-batches than
another (they differ by one at most) computes its last one again with a weight of zero, while the others compute theirs.

It runs without Horovod in the process, on world=torch.

More in hvdllm/exchange/README.md, `ddp`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from hvdllm.device import Mark
from hvdllm.errors import UserError
from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Batch, Commit, Rounded, State, Update, Values, Wire
from hvdllm.exchange.reference import Reference
from hvdllm.exchange.wire import parts as wires
from hvdllm.flat import Flat
from hvdllm.world.base import World

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
    from torch.nn.parallel import DistributedDataParallel


class Ddp(Reference[exchanges.Ddp]):
    def attach(self, model: nn.Module, flat: Flat, update: Update, wire: Wire, world: World) -> nn.Module:
        from torch.nn.parallel import DistributedDataParallel

        super().attach(model, flat, update, wire, world)
        self.divided_by = float(world.size)
        for p in self.parameters:
            p.grad = None  # DDP makes its own
        self.module = DistributedDataParallel(
            model, bucket_cap_mb=_bucket_mb(self.settings, self.wire_settings, flat.x.nbytes),
            gradient_as_bucket_view=True, forward_sync_buffers=False, init_sync=False,
        )  # fmt: skip
        self._bytes, self._power = _hook(self.module, self.wire_settings, flat, self.nominal)
        self._rebuilt = False
        self._sums, self._due = 0, 1  # of this round, and how many a round has on every rank
        return self.module

    def feed(self, stream: Rounded) -> Iterator[Batch]:
        most = self._most(stream.share(0))
        self._due = most if self.each else 1
        for batch in super().feed(stream):
            if not self._rebuilt:
                self._rebuild(batch)
            # Only a backward outside of no_sync() sends anything.
            with nullcontext() if self.summed(batch) else self.module.no_sync():
                yield batch

    @property
    def each(self) -> bool:
        """Whether every micro-batch is summed, and not only the last one of a round."""
        return bool(self.settings.sync == "micro_batch")

    def summed(self, batch: Batch) -> bool:
        return batch.last or self.each

    def _most(self, share: Sequence[Batch]) -> int:
        """The most micro-batches that a rank has in a round, which are the same in every round. Collective. Raises
        UserError if a rank has nothing to compute, since DDP sums only in a backward."""
        own = torch.tensor([sum(batch.inputs is not None for batch in share)])
        found: list[int] = self.world.gather(own, "ddp.counts", equal=True).land().tolist()
        if 0 in found:
            raise UserError(
                f"exchange=ddp: a batch has nothing for rank {found.index(0)}, and DDP needs a micro-batch of every "
                "rank: raise batch_tokens, start fewer ranks, or take exchange=allreduce"
            )
        return max(found)

    def advance(self, batch: Batch, loss: torch.Tensor) -> Commit | None:
        if self.summed(batch) and batch.tokens:
            self._sent()
        while batch.last and self._sums < self._due:
            self.arm(batch)
            (self.module(batch.inputs, batch.targets, (batch.round, batch.index)) * 0).backward()
            self._sent()
        commit = super().advance(batch, loss)
        if batch.last:
            self._sums = 0
        return commit

    def _sent(self) -> None:
        """A backward has been summed: counts it and its bytes."""
        self._sums += 1
        # The hook's state has counted this sum already.
        exact = self._power is not None and self._power.torch.iter <= self._power.torch.start_powerSGD_iter
        self.world.bytes_sent += 2 * (self.world.size - 1) / self.world.size * (self.whole if exact else self._bytes)
        if self._sums < self._due:
            self.waited()

    def _rebuild(self, batch: Batch) -> None:
        """DDP lays its buckets out anew after the first backward that it sums. A backward that counts for nothing
        brings this about before the first round, so that a resumed run adds up in the same order."""
        self._rebuilt = True
        self._armed = False
        self.module(batch.inputs, batch.targets, (batch.round, batch.index)).backward()
        with self.module.no_sync():  # DDP lays its buckets out in the forward
            self.module(batch.inputs, batch.targets, (batch.round, batch.index)).backward()
        for p in self.parameters:
            assert p.grad is not None
            p.grad.zero_()
        if self._power is not None:  # it counts the sums since the beginning of the run
            self._power.torch.iter = self.step
        self.arm(batch)
        self.now.begin, self.now.cpu_s = Mark(self.device), time.process_time()  # this was not the round's compute

    def wait(self) -> None:
        """Nothing is left to wait for: on CPUs a backward ends when its sums are there, on CUDA the stream waits."""

    def check(self, gradients: list[torch.Tensor]) -> None:
        assert not any(self.in_flat(g) for g in gradients), "DDP's gradients are views of its buckets"

    def state(self) -> State:
        state = super().state()
        if self._power is not None and 0 in self._power.torch.error_dict:
            state.summed["error"] = (self.flat.tensors(), self._power.error())
            state.tensors |= {f"ddp.{name}": kept[0] for name, kept in self._power.thin().items()}
        return state

    def load(self, state: State, mine: list[Values]) -> None:
        super().load(state, mine)
        if self._power is not None and "error" in state.summed:
            self._power.loaded = state.summed["error"].to(self.device)
            for name, kept in self._power.thin().items():
                kept[0] = state.tensors[f"ddp.{name}"].to(self.flat.x, copy=True)


def _bucket_mb(exchange: exchanges.Ddp, wire: wires.Wire, size: int) -> float:
    """PowerSGD's hook goes on from callbacks, which Gloo runs in any order. With two buckets the ranks would wait for
    each other for ever, so all gradients are one bucket. size: bytes of all gradients."""
    if isinstance(wire, wires.PowerSGD):
        return 2 * size / 2**20 + 1
    return float(exchange.bucket_mb or max(1.0, min(25.0, size / 2**23)))


class _Power:
    """torch's PowerSGD hook and its state, for one bucket. The hook keeps what it has left out (e_i of
    exchange/wire/powersgd.py, in units of a rank's own gradient) in the bucket's order of parameters, which is known
    only after a first sum."""

    def __init__(self, flat: Flat, settings: wires.PowerSGD, nominal: int) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

        self.flat, self._hook = flat, powerSGD_hook.powerSGD_hook
        self.torch = powerSGD_hook.PowerSGDState(
            process_group=None, matrix_approximation_rank=settings.rank,
            start_powerSGD_iter=max(2, settings.warmup_tokens // nominal),
            min_compression_rate=settings.min_compression,
        )  # fmt: skip
        self.loaded: torch.Tensor | None = None  # residual as a flat vector, until the bucket's order is known
        self._order: list[str] = []
        self._names = {id(p): name for name, p in flat.parameters.items()}

    def __call__(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        self._order = [self._names[id(p)] for p in bucket.parameters()]
        if self.loaded is not None and self.torch.iter >= self.torch.start_powerSGD_iter:
            parts = [self.flat.view(name, self.loaded).reshape(-1) for name in self._order]
            self.torch.error_dict[bucket.index()], self.loaded = torch.cat(parts), None
        summed: torch.futures.Future[torch.Tensor] = self._hook(self.torch, bucket)
        return summed

    def error(self) -> torch.Tensor:
        """The residual over all tensors in registration order, as flat.tensors() spans them."""
        sizes = [self.flat.parameters[name].numel() for name in self._order]
        parts = dict(zip(self._order, torch.split(self.torch.error_dict[0], sizes), strict=True))
        return torch.cat([parts[name] for name in self.flat.parameters])

    def thin(self) -> dict[str, dict[int, torch.Tensor]]:
        """P and Q by bucket; they are equal on all ranks."""
        return {"p": self.torch.p_memory_dict, "q": self.torch.q_memory_dict}


def _hook(module: DistributedDataParallel, wire: wires.Wire, flat: Flat, nominal: int) -> tuple[float, _Power | None]:
    """Registers torch's hook for a wire. Returns the bytes of a sum, and the state of PowerSGD."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    parameters = list(flat.parameters.values())
    whole = float(sum(p.nbytes for p in parameters))
    if isinstance(wire, wires.Fp16):
        module.register_comm_hook(None, default_hooks.fp16_compress_hook)
        return whole / 2, None
    if isinstance(wire, wires.Bf16):
        # By a name of its own: torch refuses its hook but with NCCL, though Gloo adds bfloat16 as well.
        module.register_comm_hook(None, lambda state, bucket: default_hooks.bf16_compress_hook(state, bucket))
        return whole / 2, None
    if isinstance(wire, wires.PowerSGD):
        power = _Power(flat, wire, nominal)
        module.register_comm_hook(None, lambda _, bucket: power(bucket))
        return float(sum(_power_bytes(p, wire) for p in parameters)), power
    return whole, None


def _power_bytes(p: torch.Tensor, wire: wires.PowerSGD) -> int:
    """Bytes that torch's hook sends of a gradient: its two thin factors where they are small enough, else all of it."""
    rows = p.shape[0] if p.dim() > 1 else 1
    columns = p.numel() // rows
    thin = (rows + columns) * wire.rank
    return thin * p.element_size() if p.dim() > 1 and thin * wire.min_compression < p.numel() else p.nbytes
