"""The world over Horovod. This is the only module that imports horovod.torch and initialises it.

It keeps three rules, each of which was learnt from a failure:
- There is no fusion unless it is asked for, and no autotune. Buckets already are what fusion would make. Fusion by
  timing changes the order of sums, so from 3 ranks on two equal runs would differ.
- Waiting is polling with short sleeps, because hvd.synchronize spins and takes a core from the compute.
- A collective that fails because another rank is gone is not this rank's error.

Horovod does not know bfloat16. The bits of such tensors travel as int16, and sums are made here in fp32 from the bits
that all-to-all has brought.

What Horovod sends over Gloo (third_party/gloo in its source), per rank, for x of P bytes and N ranks:
- all-reduce is a ring: 2(N-1)/N P
- allgatherv is a ring: all blocks but that of the right neighbour, (N-1) P for equal blocks or as the mean over ranks
- alltoallv is direct: (N-1)/N P
- broadcast is a binomial tree
Its reduce-scatter is recursive halving with a redistribution, which sends up to P from the busiest rank, so on CPUs
this module scatters by all-to-all instead.

On GPUs a flight has landed when its kernel has run, and the host waits for that. Horovod makes the results of gathers
and all-to-alls in its own thread, on another stream than the one that uses them (mend_cuda in setup.sh), so each flight
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

from hvdllm import pulse, registry
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


# Horovod's thread talks to the other ranks in every cycle, even if there is nothing to do. With cycles of 1 ms, its
# default, that took 6 to 10 % of a core per rank on two busy cores; with 10 ms it took 1.5 %. For few, large operations
# the latency matters less.
CYCLE_MS = "5"
GLOO_LATER_S = 60  # seconds by which Gloo gives up later than this rank, which ends with a sentence (world.timeout_s)


class HorovodFlight:
    """One collective. `land` polls, and sleeps 20 µs to 10 ms between polls.

    Args:
        handle: of the operation, from Horovod.
        name: of the collective.
        world: whose collective it is.
        finish: makes what lands from what Horovod returns.
    """

    def __init__(self, handle: int, name: str, world: HorovodRanks, finish: Callable[[Any], torch.Tensor]) -> None:
        self.handle, self.name, self.world, self.finish = handle, name, world, finish
        self.value: torch.Tensor | None = None

    def landed(self) -> bool:
        return self.value is not None or bool(_peer_errors(lambda: hvd.poll(self.handle)))

    def land(self) -> torch.Tensor:
        if self.value is None:
            with pulse.waiting(f"`{self.name}`"):
                self._wait()
            out = used_here(_peer_errors(lambda: hvd.synchronize(self.handle)))
            self.value = used_here(self.finish(out))
        return self.value

    def _wait(self) -> None:
        pause, begin = 2e-5, time.monotonic()
        while not self.landed():
            self.world.threads.check()
            waited = time.monotonic() - begin
            if waited > self.world.timeout_s:
                raise PeerError(too_long(waited, f"`{self.name}`"))
            time.sleep(pause)
            # A collective that takes long is polled rarely, because the compute needs the cores.
            pause = min(1.5 * pause, max(1e-3, waited / 100), 1e-2)


def _peer_errors(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except HorovodInternalError as error:
        raise _gone(error) from None


def _gone(error: Exception) -> PeerError:
    return PeerError(f"a collective failed, most likely because another rank is gone ({error})")


def _bits(x: torch.Tensor) -> torch.Tensor:
    """A view of x in a dtype that Horovod can move."""
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x


class HorovodRanks(Ranks):
    """The collectives of one process set.

    Args:
        process_set: Horovod's.
        members: its ranks, numbered in the whole world, ascending.
        where: rank, size, local rank and local size within the set.
        timeout_s: how long a rank waits for the others.
        parent: the whole world, if this is a part of one.
    """

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
            # The values of x are lost anyway, so the sum goes into this rank's share of x, and what landed is freed.
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
        """In place: x, one layer's mean gradient over this rank's tokens, becomes the Adasum of all ranks' x.

        Horovod has Adasum only over MPI and for the whole world; otherwise all x are gathered. They are gathered on
        GPUs too, where Horovod's own adds up within a host first, which gives another result.
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
        """Does nothing, because a part ends with the whole world."""


def _tensor(out: Any) -> torch.Tensor:
    """The tensor that hvd.alltoall returns, which may come with the sizes of its blocks."""
    arrived: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return arrived


def tell_horovod(timeout_s: float, groups: bool, fuse: bool) -> None:
    """Sets the environment variables that Horovod reads when it starts.

    Args:
        timeout_s: how long a rank waits for the others.
        groups: whether process sets will be added.
        fuse: whether Horovod may fuse collectives.
    """
    if not fuse:
        os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
        if not torch.cuda.is_available():
            os.environ.setdefault("HOROVOD_CYCLE_TIME", CYCLE_MS)
    # Gloo gives up by itself, after 30 s by default, and ends the process.
    os.environ["HOROVOD_GLOO_TIMEOUT_SECONDS"] = str(math.ceil(timeout_s) + GLOO_LATER_S)
    if groups:
        os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"


class HorovodWorld(HorovodRanks):
    """The ranks that a launcher started.

    Args:
        place: what the environment says of this rank.
        timeout_s: how long a rank waits for the others.
        groups: whether `split` will be called. It needs process sets that can be added, which cost a synchronisation
          in every cycle.
        fuse: whether Horovod may fuse collectives.
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
        for group in groups:  # in the same order on every rank; Horovod takes each set of ranks only once
            if (key := tuple(sorted(group))) not in self._sets:
                self._sets[key] = _peer_errors(partial(hvd.add_process_set, list(key)))
        return HorovodRanks(self._sets[mine], mine, (mine.index(self.rank), len(mine), *local), self.timeout_s, self)

    def mail(self) -> Mail:
        if not hvd.mpi_enabled():
            raise UserError("Gloo's ranks know collectives and no letters: start them with horovodrun --mpi or mpirun")
        from hvdllm.world.mpi import MpiMail  # imported here, because it needs the MPI that Horovod has initialised

        return MpiMail(self)

    def distributed_optimizer(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
        compression: str = "none",
    ) -> Any:
        """Horovod's own optimizer, for the reference exchange. It sums gradients, and its bytes are not counted.

        Args:
            optimizer: of torch, to be wrapped.
            named_parameters: of the model.
            compression: none or fp16.

        Sums are launched by `synchronize()` and not after a number of backward passes.
        """
        return hvd.DistributedOptimizer(
            optimizer, named_parameters=list(named_parameters), op=hvd.Sum, backward_passes_per_step=2**30,
            compression={"none": hvd.Compression.none, "fp16": hvd.Compression.fp16}[compression],
        )  # fmt: skip

    def close(self) -> None:
        self._driver.close()
        self.sum(torch.zeros(1), "world.close").land()
        hvd.shutdown()


def opened(setup: Setup, place: Place) -> HorovodWorld:
    """The world of the ranks that the launcher of this process started."""
    config = setup.config
    fuse = registry.of("exchange", config.exchange).facts.carries == registry.HOROVOD
    return HorovodWorld(
        place, config.world.timeout_s, groups=config.wire.hierarchical or config.exchange.groups, fuse=fuse
    )
