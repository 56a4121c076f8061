"""The world over Horovod: the one module that imports horovod.torch and initialises it.

Rules it keeps (each learnt from a failure): no fusion, but where it is asked for, and no autotune (our buckets are the
fusion, and fusing by timing changes the order of sums, so from 3 ranks on two equal runs would differ); waiting is
polling with short sleeps (hvd.synchronize spins and steals a core from the compute); a collective that fails because
another rank is gone is not this rank's error.

Horovod knows no bfloat16: its bits travel as int16, and sums of them are made here from scattered bits, in fp32.
What it sends over Gloo (third_party/gloo of its source), a rank, x of P bytes, N ranks: all-reduce, a ring,
2(N-1)/N P; allgatherv, a ring, all blocks but its right neighbour's, so (N-1) P where blocks are equal and in the
mean over ranks; alltoallv, direct, (N-1)/N P; broadcast, a binomial tree. Its reduce-scatter is recursive halving with
a redistribution and up to P on the busiest rank: on CPUs we scatter by alltoall instead.

On GPUs a flight has landed when its kernel has run: the host waits. What Horovod returns of gathers and all-to-alls it
makes in its own thread, on another stream than that which uses it (setup.sh's mend_cuda says which), so every flight
records what it lands. Not yet run on a GPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from hvdllm import registry
from hvdllm.device import used_here
from hvdllm.errors import PeerError, UserError
from hvdllm.settings import Setup
from hvdllm.world.base import Flight, Mail
from hvdllm.world.detect import Place
from hvdllm.world.mail import at_most, too_long
from hvdllm.world.ranks import Ranks, Where, adasum, add, broadcast_sends, group_of, must_be_power_of_two

os.environ.pop("HOROVOD_AUTOTUNE", None)

try:
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
except ImportError as error:
    raise UserError(
        f"Horovod cannot be imported ({error}): run jobs/setup.sh from a clone of hvdllm, or start one process alone"
    ) from None


# Horovod's thread talks to the other ranks every cycle, also when there is nothing to do: at its 1 ms that took 6 to
# 10 % of a core each on two busy cores, at 10 ms 1.5 %. With few, large operations the latency matters less.
CYCLE_MS = "5"
GLOO_LATER_S = 60  # seconds after world.timeout_s, at which this rank ends with a sentence


class HorovodFlight:
    """One collective; `land` waits by poll and sleeps of 20 µs to 10 ms. finish: what lands, of what Horovod says."""

    def __init__(self, handle: int, name: str, world: HorovodRanks, finish: Callable[[Any], torch.Tensor]) -> None:
        self.handle, self.name, self.world, self.finish = handle, name, world, finish
        self.value: torch.Tensor | None = None

    def landed(self) -> bool:
        return self.value is not None or bool(_peer_errors(lambda: hvd.poll(self.handle)))

    def land(self) -> torch.Tensor:
        if self.value is None:
            pause, begin = 2e-5, time.monotonic()
            while not self.landed():
                self.world.threads.check()
                waited = time.monotonic() - begin
                if waited > self.world.timeout_s:
                    raise PeerError(too_long(waited, f"`{self.name}`"))
                time.sleep(pause)
                # What takes long is asked for rarely: while it flies, compute wants the cores.
                pause = min(1.5 * pause, max(1e-3, waited / 100), 1e-2)
            out = used_here(_peer_errors(lambda: hvd.synchronize(self.handle)))
            self.value = used_here(self.finish(out))
        return self.value


def _peer_errors(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except HorovodInternalError as error:
        raise _gone(error) from None


def _gone(error: Exception) -> PeerError:
    return PeerError(f"a collective failed, most likely because another rank is gone ({error})")


def _bits(x: torch.Tensor) -> torch.Tensor:
    """x as Horovod can move it."""
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x


class HorovodRanks(Ranks):
    """The collectives of one process set. members: its ranks, numbered in the whole world, ascending."""

    def __init__(
        self, process_set: Any, members: Sequence[int], where: Where, timeout_s: float, parent: Ranks | None = None
    ) -> None:
        super().__init__(where, timeout_s, parent)
        self.process_set, self.members = process_set, tuple(members)

    def sum(self, x: torch.Tensor, name: str) -> Flight:
        if x.dtype is torch.bfloat16:
            raise UserError("Horovod adds no bfloat16: send fp32, or a coded wire, or choose world=torch")
        self.count(2 * (self.size - 1) / self.size * x.nbytes)
        handle = _peer_errors(lambda: hvd.allreduce_async_(x, name=name, op=hvd.Sum, process_set=self.process_set))
        return HorovodFlight(handle, name, self, lambda out: out)

    def scatter(self, x: torch.Tensor, name: str) -> Flight:
        own = x.chunk(self.size)[self.rank]
        if not x.is_cuda or x.dtype is torch.bfloat16:
            # x is spent once landed: the sum goes into our own share of it, and the landed copy of x is free again.
            return self._alltoall(x, name, lambda out: add(out.chunk(self.size), own))
        self.count((self.size - 1) / self.size * x.nbytes)
        handle = _peer_errors(lambda: hvd.reducescatter_async(x, name=name, op=hvd.Sum, process_set=self.process_set))
        return HorovodFlight(handle, name, self, lambda out: out)

    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Flight:
        self.count((self.size - 1) * x.nbytes)
        handle = _peer_errors(lambda: hvd.allgather_async(_bits(x), name=name, process_set=self.process_set))
        return HorovodFlight(handle, name, self, lambda out: out.view(x.dtype))

    def alltoall(self, x: torch.Tensor, name: str) -> Flight:
        return self._alltoall(x, name, lambda out: out)

    def _alltoall(self, x: torch.Tensor, name: str, finish: Callable[[torch.Tensor], torch.Tensor]) -> Flight:
        self.count((self.size - 1) / self.size * x.nbytes)
        handle = _peer_errors(lambda: hvd.alltoall_async(_bits(x), name=name, process_set=self.process_set))
        return HorovodFlight(handle, name, self, lambda out: finish(_tensor(out).view(x.dtype)))

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        self.count(broadcast_sends(self.rank, root, self.size) * x.nbytes)
        handle = _peer_errors(
            lambda: hvd.broadcast_async_(_bits(x), self.members[root], name=name, process_set=self.process_set)
        )
        return HorovodFlight(handle, name, self, lambda out: x)

    def adasum(self, x: torch.Tensor, name: str) -> Flight:
        """In place: every rank's x becomes the Adasum of all. x: one layer's tensor, the mean over this rank's tokens.

        Horovod has it over MPI only, and for the whole world: elsewhere all x are gathered. On GPUs too, where its own
        adds up within a host first, which is other mathematics.
        """
        must_be_power_of_two(self.size)
        if self.parent is None and hvd.mpi_enabled() and not x.is_cuda and x.dtype is not torch.bfloat16:
            self.count(2 * (self.size - 1) / self.size * x.nbytes)
            handle = _peer_errors(lambda: hvd.allreduce_async_(x, name=name, op=hvd.Adasum))
            return HorovodFlight(handle, name, self, lambda out: out)
        flat = x.reshape(-1)
        self.count((self.size - 1) * x.nbytes)
        handle = _peer_errors(lambda: hvd.allgather_async(_bits(flat), name=name, process_set=self.process_set))

        def join(out: torch.Tensor) -> torch.Tensor:
            return x.copy_(adasum(out.view(x.dtype).chunk(self.size)).view_as(x))

        return HorovodFlight(handle, name, self, join)

    def lost(self, error: Exception) -> PeerError | None:
        return _gone(error) if isinstance(error, HorovodInternalError) else None

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> HorovodRanks:
        raise RuntimeError(f"`{name}` splits a part of a world: split the whole one, Horovod knows no parts of parts")

    def close(self) -> None:
        """A part ends with the whole."""


def _tensor(out: Any) -> torch.Tensor:
    """hvd.alltoall returns what arrived and how much of it came from whom."""
    arrived: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return arrived


def tell_horovod(timeout_s: float, groups: bool, fuse: bool) -> None:
    """Its settings, before it starts."""
    if not fuse:
        os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
        if not torch.cuda.is_available():
            os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_MS)
    # Gloo gives up by itself, after 30 s where nobody says otherwise, and takes the process with it.
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(math.ceil(timeout_s) + GLOO_LATER_S)
    if groups:
        os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"


class HorovodWorld(HorovodRanks):
    """The ranks that a launcher started; `place` is what its environment says of this one.

    groups: `split` will be called. It needs process sets that can be added, which cost a synchronisation a cycle.
    """

    def __init__(self, place: Place, timeout_s: float, *, groups: bool = False, fuse: bool = False) -> None:
        self.groups = groups
        tell_horovod(timeout_s, groups, fuse)
        with at_most(timeout_s, "the other ranks to start"):
            _peer_errors(hvd.init)
        if (hvd.rank(), hvd.size()) != (place.rank, place.size):
            raise UserError(
                f"the launcher says rank {place.rank} of {place.size}, Horovod says {hvd.rank()} of {hvd.size()}: "
                "this Horovod was built for another launcher; `hvdllm doctor` shows its controllers"
            )
        where = (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
        super().__init__(hvd.global_process_set, range(hvd.size()), where, timeout_s)
        if not hvd.nccl_built():
            self.no_cuda = (
                "this Horovod was built without NCCL and carries no CUDA tensors (jobs/setup.sh --nccl builds it)"
            )
        self._sets: dict[tuple[int, ...], Any] = {self.members: hvd.global_process_set}

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> HorovodRanks:
        if not self.groups:
            raise RuntimeError(f"`{name}` needs a HorovodWorld that was made with groups=True")
        mine = group_of(self.rank, groups, self.size)
        local = self._local(mine, name)
        for group in groups:  # added in the same order on every rank; Horovod takes each set of ranks once
            if (key := tuple(sorted(group))) not in self._sets:
                self._sets[key] = _peer_errors(partial(hvd.add_process_set, list(key)))
        return HorovodRanks(self._sets[mine], mine, (mine.index(self.rank), len(mine), *local), self.timeout_s, self)

    def mail(self) -> Mail:
        if not hvd.mpi_enabled():
            raise UserError("Gloo's ranks know collectives and no letters: start them with horovodrun --mpi or mpirun")
        from hvdllm.world.mpi import MpiMail  # here, because it needs the MPI that Horovod has initialised

        return MpiMail(self)

    def distributed_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        compression: str = "none",
    ) -> Any:
        """Horovod's own optimizer, as everybody uses it, for the reference exchange: sums, launched by its
        `synchronize()` and by no count of backward passes. compression: none or fp16. Its bytes are not counted."""
        return hvd.DistributedOptimizer(
            optimizer, named_parameters=list(named_parameters), op=hvd.Sum, backward_passes_per_step=2**30,
            compression={"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}[compression],
        )  # fmt: skip

    def close(self) -> None:
        self._driver.close()
        self.sum(torch.zeros(1), "world.close").land()
        hvd.shutdown()


def opened(setup: Setup, place: Place) -> HorovodWorld:
    """This process's rank among those of its launcher."""
    config = setup.config
    fuse = registry.of("exchange", config.exchange).facts.carries == registry.HOROVOD
    return HorovodWorld(
        place, config.world.timeout_s, groups=config.wire.hierarchical or config.exchange.groups, fuse=fuse
    )
