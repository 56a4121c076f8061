"""Our wires as a communication hook of torch's DistributedDataParallel.

    ddp = torch.nn.parallel.DistributedDataParallel(model)
    hook = hvdllm.hook(ddp, wire="int8")

From then on each backward sends its gradients over that wire, with error feedback, while the rest of the backward goes
on. All else stays torch's. What a wire leaves out is kept by the hook, not by DDP, and is lost when the script ends.

Not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hvdllm import registry
from hvdllm.config.compose import compose
from hvdllm.device import pool
from hvdllm.errors import UserError
from hvdllm.exchange.base import Wire
from hvdllm.exchange.wire.build import make_wire
from hvdllm.flat import ALIGN_BYTES, Bucket, Flat, Span
from hvdllm.world.torch import CHANNELS, TorchRanks

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
    from torch.nn.parallel import DistributedDataParallel

Make = Callable[[TorchRanks, Flat], Wire]
Layout = list[list[str]]  # the names of the tensors in each of DDP's buckets
TIMEOUT_S = 1800.0  # as torch's own for Gloo


def hook(module: DistributedDataParallel, wire: str = "int8", settings: Sequence[str] = ()) -> Hook:
    """Makes DDP send its gradients over one of our wires. Collective; call it once, before the first backward.

    Args:
        module: a DistributedDataParallel without another communication hook.
        wire: the name of a wire that carries whole sums, as on the command line.
        settings: its settings as words, such as `wire.block=64`. Those that count tokens (`wire.warmup_tokens`) count
          backward passes here.

    Raises UserError if there is no such wire, or if it needs more than sums.
    """
    config = compose([f"wire={wire}", *settings])
    if registry.SUMS not in registry.of("wire", config.wire).facts.carries:
        raise UserError(f"hook: wire={wire} carries no whole sums, which is what DDP sends")
    if config.wire.hierarchical:
        raise UserError("hook: wire.hierarchical needs a world of hvdllm's own: leave it at false")
    made = Hook(module, lambda world, flat: make_wire(config.wire, world, flat, world.size))
    module.register_comm_hook(None, lambda state, bucket: made(bucket))
    return made


class Map(Flat):
    """DDP's buckets as a flat map of their own. No parameter is moved, and `x` takes no memory.

    Args:
        module: whose parameters these are.
        layout: the names in each bucket, in order.
        ranks: each bucket is padded so that it can be cut into so many equal slices.
    """

    def __init__(self, module: torch.nn.Module, layout: Layout, ranks: int) -> None:
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        first = next(iter(self.parameters.values()))
        unit = ranks * ALIGN_BYTES // first.element_size()
        self.at, self.buckets, end = {}, [], 0
        for index, names in enumerate(layout):
            start = end
            for name in names:
                self.at[name] = slice(end, end := end + self.parameters[name].numel())
            end = start + -(-(end - start) // unit) * unit
            decayed = any(self.parameters[name].dim() >= 2 for name in names)
            self.buckets.append(Bucket(index, Span(start, end, decayed), tuple(names)))
        self.x = torch.zeros(1, dtype=first.dtype, device=first.device).expand(end)


class Hook:
    """Sends DDP's buckets.

    DDP lays its buckets out anew after the first backward. Until two backward passes have had the same layout,
    gradients are summed as they are.

    Attributes:
        world: the ranks of the module's process group; `bytes_sent` counts what this rank has sent over the wire.
        wire: the wire, or None as long as the layout is not known.
    """

    def __init__(self, module: DistributedDataParallel, make: Make) -> None:
        group = module.process_group
        ranks = dist.get_process_group_ranks(group)
        groups = [dist.new_group(ranks, backend=dist.get_backend(group)) for _ in CHANNELS]
        size, rank = len(ranks), dist.get_rank(group)
        self.module, self.make = module.module, make
        self.world = TorchRanks(groups, range(size), (rank, size, rank, size), TIMEOUT_S)
        self.wire: Wire | None = None
        self.names = {id(p): name for name, p in self.module.named_parameters()}
        self.map: Map | None = None
        self.passes = 0  # backward passes over the wire so far
        self._seen: Layout = []
        self._before: Layout = []
        self._room: dict[int, torch.Tensor] = {}  # one padded bucket each
        self._landing = pool("hook")

    def __call__(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        """Launches the sum of a bucket. The future lands the mean over the ranks, in the bucket's own memory."""
        x, index = bucket.buffer(), bucket.index()
        self._seen.append([self.names[id(p)] for p in bucket.parameters()])
        wire, size = self.wire, self.world.size
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[x.device] if x.is_cuda else None)
        if wire is None or self.map is None:
            work = dist.all_reduce(x.div_(size), group=self.world.channels["grad"].group, async_op=True).get_future()
            plain: torch.futures.Future[torch.Tensor] = work.then(lambda done: done.value()[0])
            self._turn(bucket)
            return plain
        if len(self._seen) == 1:
            wire.begin(self.passes, 1.0 / size)
        span = self.map.buckets[index].span
        room = self._room.setdefault(index, x.new_zeros(span.stop - span.start))
        room[: len(x)].copy_(x)
        flight = wire.sum(room, f"grad.{index}")
        ready = torch.cuda.current_stream(x.device).record_event() if x.is_cuda else None

        def land() -> None:
            try:
                if ready is not None:
                    torch.cuda.current_stream(x.device).wait_event(ready)
                flight.land()
                torch.div(room[: len(x)], size, out=x)
                future.set_result(x)
            except Exception as error:
                future.set_exception(error)  # type: ignore[arg-type]  # torch's own annotation is wrong

        self._landing.submit(land)
        self._turn(bucket)
        return future

    def close(self) -> None:
        """Ends the threads of the hook, once no backward is under way. Process groups end with torch.distributed."""
        self._landing.shutdown()
        self.world._driver.close()
        self.world.close()

    def _turn(self, bucket: GradBucket) -> None:
        """After the last bucket of a backward: counts it, and makes the wire once the layout is the one before."""
        if not bucket.is_last():
            return
        self.passes += self.wire is not None
        if self.wire is None and self._seen == self._before:
            self.map = Map(self.module, self._seen, self.world.size)
            self.wire = self.make(self.world, self.map)
        self._before, self._seen = self._seen, []
