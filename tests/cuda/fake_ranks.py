"""Stand-ins for Horovod with NCCL and for torch.distributed with NCCL: one rank of several, the others do as it does.

They are here because no machine of the tests has a GPU: what is looked at is the order of streams and the life of
memory, by their rules. A collective is a kernel on a stream of the library's own, behind what the caller's current
stream holds.

    Horovod 0.28.1   `synchronize` returns when the kernel has run: the host has waited. What allgather and alltoall
                     return is made by a thread of Horovod, on a stream of its own (jobs/setup.sh, `mend`)
    torch 2.13       `wait` lets the caller's current stream wait, the host goes on; the work holds its tensors so long
"""

from __future__ import annotations

import importlib
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import fake_cuda
import torch
import torch.distributed as dist
from fake_cuda import Stream, current_stream, on_stream

from hvdllm.world import torch as world_torch


def launch(name: str, reads: list[Any], writes: list[Any], lane: str) -> dict[Any, int]:
    books, device = fake_cuda.the_books(), reads[0].device
    key = (device.index, lane)
    books.order(key, books.clocks[current_stream(device).key])
    return books.kernel(name, [x.numbers for x in reads], [x.numbers for x in writes], key)


# ------------------------------------------------------------------ what the ranks' numbers are, if all do the same
def summed(x: torch.Tensor, size: int) -> torch.Tensor:
    return bare(x).mul_(size)


def joined(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([bare(x)] * size)


def dealt(x: torch.Tensor, size: int) -> torch.Tensor:
    return torch.cat([bare(x).chunk(size)[0]] * size)


def bare(x: torch.Tensor) -> torch.Tensor:
    return getattr(x, "numbers", x)


# ------------------------------------------------------------------ Horovod
class Hvd(types.ModuleType):
    """horovod.torch, as far as world/hvd.py asks for it."""

    Sum, Adasum = "sum", "adasum"
    global_process_set = "world"
    Compression = types.SimpleNamespace(none="none", fp16="fp16")

    def __init__(self, size: int) -> None:
        super().__init__("horovod.torch")
        self.ranks = size
        self.handles: dict[int, tuple[Any, Any]] = {}
        self.sets = {"world": size}
        self.aside: Stream | None = None

    def init(self) -> None: ...

    def shutdown(self) -> None: ...

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return self.ranks

    def local_rank(self) -> int:
        return 1

    def local_size(self) -> int:
        return 2

    def mpi_enabled(self) -> bool:
        return True

    def nccl_built(self) -> int:
        return 23004

    def add_process_set(self, ranks: list[int]) -> Any:
        self.sets[str(ranks)] = len(ranks)
        return str(ranks)

    def _post(self, name: str, x: torch.Tensor, made: Callable[[torch.Tensor, int], torch.Tensor], group: str) -> int:
        """A collective that makes its output."""
        assert x.is_contiguous() and x.dtype is not torch.bfloat16
        out, clock = made(x, self.sets[group]), None
        if x.is_cuda:
            self.aside = self.aside or Stream(x.device)
            with on_stream(self.aside):
                out = empty_for(out, x.device)
            clock = launch(name, [x], [out], "hvd")
        return self._handle(out, clock)

    def _handle(self, out: Any, clock: Any) -> int:
        self.handles[len(self.handles)] = (out, clock)
        return len(self.handles) - 1

    def allreduce_async_(self, x: torch.Tensor, name: str, op: str, process_set: str = "world") -> int:
        assert x.is_contiguous() and not (x.is_cuda and x.dtype in (torch.int16, torch.bfloat16))
        assert op == self.Sum or not x.is_cuda, "Horovod's Adasum of CUDA tensors adds up within a host first"
        summed(x, self.sets[process_set])
        return self._handle(x, launch(f"allreduce {name}", [x], [x], "hvd") if x.is_cuda else None)

    def broadcast_async_(self, x: torch.Tensor, root: int, name: str, process_set: str = "world") -> int:
        return self._handle(x, launch(f"broadcast {name}", [x], [x], "hvd") if x.is_cuda else None)

    def reducescatter_async(self, x: torch.Tensor, name: str, op: str, process_set: str = "world") -> int:
        return self._post(f"reducescatter {name}", x, lambda x, n: bare(x).chunk(n)[0] * n, process_set)

    def allgather_async(self, x: torch.Tensor, name: str, process_set: str = "world") -> int:
        return self._post(f"allgather {name}", x, joined, process_set)

    def alltoall_async(self, x: torch.Tensor, name: str, process_set: str = "world") -> int:
        return self._post(f"alltoall {name}", x, dealt, process_set)

    def poll(self, handle: int) -> bool:
        return True

    def synchronize(self, handle: int) -> torch.Tensor:
        out, clock = self.handles.pop(handle)
        self.handles[handle] = (None, None)
        if clock is not None:
            fake_cuda.the_books().host_waits(clock)
        return out

    def DistributedOptimizer(self, optimizer: Any, named_parameters: list[Any], compression: str, **_: Any) -> Any:
        """Sums in `synchronize` what its hooks would have sent before; in fp16 it decodes into new memory."""

        def synchronize() -> None:
            for name, p in named_parameters:
                sent = p.grad.half() if compression == "fp16" else p.grad
                arrived = self.synchronize(self.allreduce_async_(sent, name, "sum"))
                p.grad = arrived.to(p.dtype)

        optimizer.synchronize, optimizer.set_backward_passes_per_step = synchronize, lambda passes: None
        return optimizer


def empty_for(numbers: torch.Tensor, device: Any) -> torch.Tensor:
    """Memory on the device's current stream, with these numbers but no kernel that wrote them."""
    out = torch.empty(numbers.shape, dtype=numbers.dtype, device=device)
    out.numbers.copy_(numbers)  # type: ignore[attr-defined]
    return out


def put_horovod(size: int) -> None:
    exceptions: Any = types.ModuleType("horovod.common.exceptions")
    exceptions.HorovodInternalError = type("HorovodInternalError", (Exception,), {})
    package: Any = types.ModuleType("horovod")
    package.torch = Hvd(size)
    sys.modules |= {
        "horovod": package, "horovod.common": types.ModuleType("horovod.common"), "horovod.torch": package.torch,
        "horovod.common.exceptions": exceptions,
    }  # fmt: skip
    sys.modules.pop("hvdllm.world.hvd", None)
    importlib.import_module("hvdllm.world.hvd")


# ------------------------------------------------------------------ torch.distributed
class Group:
    made = 0

    def __init__(self, size: int) -> None:
        Group.made += 1
        self.ranks, self.lane = size, f"nccl{Group.made}"


class Work:
    def __init__(self, clock: Any, device: Any, tensors: list[Any]) -> None:
        self.clock, self.device, self.tensors = clock, device, tensors

    def is_completed(self) -> bool:
        return True

    def wait(self, timeout: Any = None) -> bool:
        if self.clock is not None:
            fake_cuda.the_books().order(current_stream(self.device).key, self.clock)
        self.tensors = []
        return True


def put_distributed(size: int) -> None:
    """In the place of what world/torch.py and exchange/ddp.py ask of torch.distributed."""

    threads: set[str] = set()

    def post(name: str, group: Group, x: Any, out: Any, numbers: torch.Tensor) -> Work:
        assert x.is_cuda == out.is_cuda, f"{name} from {x.device} to {out.device}"
        assert out.numel() == numbers.numel(), f"{name} of {numbers.numel()} elements into {out.numel()}"
        bare(out).view(-1).copy_(numbers.view(-1))
        clock = None
        if x.is_cuda:
            threads.add(threading.current_thread().name)
            if len(threads) > 1:  # then their order is that of the threads' speed
                fake_cuda.the_books().find("order", f"NCCL is asked by the threads {sorted(threads)}")
            clock = launch(name, [x], [out], group.lane)
        return Work(clock, x.device, [x, out])

    def all_reduce(x: Any, group: Any = None, async_op: bool = False) -> Work:
        return post("all_reduce", group, x, x, summed(x, group.ranks))

    def broadcast(x: Any, source: int, group: Any = None, async_op: bool = False) -> Work:
        return post("broadcast", group, x, x, bare(x))

    def reduce_scatter_single(out: Any, x: Any, group: Any = None, async_op: bool = False) -> Work:
        return post("reduce_scatter", group, x, out, bare(x).chunk(group.ranks)[0] * group.ranks)

    def all_gather_single(out: Any, x: Any, group: Any = None, async_op: bool = False) -> Work:
        return post("all_gather", group, x, out, joined(x.reshape(-1), group.ranks))

    def all_to_all_single(out: Any, x: Any, group: Any = None, async_op: bool = False) -> Work:
        return post("all_to_all", group, x, out, dealt(x, group.ranks))

    def new_group(ranks: Any = None, timeout: Any = None, backend: Any = None) -> Group:
        return Group(size if ranks is None else len(ranks))

    for stand_in in (
        all_reduce, broadcast, reduce_scatter_single, all_gather_single, all_to_all_single, new_group,
    ):  # fmt: skip
        setattr(dist, stand_in.__name__, stand_in)
    dist.is_nccl_available = lambda: True
    dist.init_process_group = dist.destroy_process_group = lambda *a, **k: None  # type: ignore[assignment]
    world_torch.Watch = Nobody  # type: ignore[misc, assignment]
    torch.nn.parallel.DistributedDataParallel = Replicas  # type: ignore[misc, assignment]


class Nobody:
    """In the place of the watch for ranks that end: these never began."""

    def __init__(self, group: Any, rank: int, size: int) -> None: ...

    def gone(self, within_s: float = 0.0) -> None: ...

    def close(self) -> None: ...


class Replicas(torch.nn.Module):
    """In the place of DistributedDataParallel: sums what the last backward brought, when that is over."""

    def __init__(self, module: torch.nn.Module, **_: Any) -> None:
        super().__init__()
        self.module, self.quiet = module, False
        self.group = Group(2)
        for p in module.parameters():
            p.register_post_accumulate_grad_hook(self._sum)

    def forward(self, *args: Any) -> Any:
        return self.module(*args)

    def no_sync(self) -> Any:
        replicas = self

        class Quiet:
            def __enter__(self) -> None:
                replicas.quiet = True

            def __exit__(self, *_: Any) -> None:
                replicas.quiet = False

        return Quiet()

    def register_comm_hook(self, state: Any, hook: Any) -> None: ...

    def _sum(self, p: torch.Tensor) -> None:
        if not self.quiet:
            dist.all_reduce(p.grad, group=self.group, async_op=True).wait()
