"""The world over torch.distributed, with Gloo for CPU tensors and NCCL for CUDA tensors. It does not import Horovod.

torch.distributed matches collectives by the order of the calls. On CPUs each channel (the first word of a name) has its
own process group, so only the order within a channel counts. Channels are made at the start, in the same order on all
ranks. Names whose first word is no channel travel on `other`, which two threads must not use at once. On GPUs all
collectives have one order, in which one thread launches them (launches.py), and one communicator.

Bytes are counted by the formulas in world/hvd.py. Here a gather also exchanges its sizes first, and pads if they
differ. NCCL is counted by the same formulas. Not yet run with NCCL on more than one GPU.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore

from hvdllm import pulse
from hvdllm.device import be_patient, pool, used_here
from hvdllm.errors import PeerError, UserError
from hvdllm.settings import Setup
from hvdllm.world.base import Flight
from hvdllm.world.detect import Place
from hvdllm.world.launches import Launches
from hvdllm.world.mail import too_long
from hvdllm.world.ranks import Ranks, Where, adasum, add, broadcast_sends, group_of, must_be_power_of_two
from hvdllm.world.watch import AGES, Watch

CHANNELS = ("grad", "meta", "param", "total", "act", "start", "load", "save", "world", "other")
SLICE = timedelta(seconds=1)  # the longest wait in C++, after which Python handles signals
IFACE = "GLOO_SOCKET_IFNAME"
NEWS_S = 2.0  # seconds that a failed collective waits to learn which rank is gone


class Channel:
    """One process group, whose collectives are launched in the order of the calls.

    A collective is launched at once, unless one before it must first wait for the sizes of other ranks. Then a thread
    of the channel launches both.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self._pool: ThreadPoolExecutor | None = None
        self._last: Future[dist.Work] | None = None

    def launch(self, start: Callable[[], dist.Work], waits: bool = False) -> Future[dist.Work]:
        """Launches a collective. waits: `start` waits for other ranks, so it must not run on the calling thread."""
        if not waits and (self._last is None or self._last.done()):
            future: Future[dist.Work] = Future()
            future.set_result(start())
            return future
        if self._pool is None:
            self._pool = pool("channel")
        self._last = self._pool.submit(start)
        return self._last

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


class TorchFlight:
    """One collective.

    Args:
        future: of its work, complete once it is launched.
        x: the tensor that was passed.
        name: of the collective.
        world: whose collective it is.
        finish: makes what lands.
        made: other tensors that the collective reads or writes, kept until it lands.
    """

    def __init__(
        self,
        future: Future[dist.Work],
        x: torch.Tensor,
        name: str,
        world: TorchRanks,
        finish: Callable[[], torch.Tensor],
        made: Sequence[torch.Tensor] = (),
    ) -> None:
        self.future, self.x, self.name, self.world, self.finish, self.made = future, x, name, world, finish, made
        self.value: torch.Tensor | None = None

    def landed(self) -> bool:
        if self.value is not None:
            return True
        # A launch that failed has landed, too: `land` raises the error.
        return self.future.done() and (self.future.exception() is not None or self.future.result().is_completed())

    def land(self) -> torch.Tensor:
        if self.value is None:
            with pulse.waiting(f"`{self.name}`"):
                work = self.world.launched(self.future, self.name)
                self.world.wait(work, self.name, on_host=not self.x.is_cuda)
            used_here([self.x, self.made])  # they were made on another stream, and are freed on this one
            self.value = used_here(self.finish())
            self.made = ()
        return self.value


class TorchRanks(Ranks):
    """The collectives of a world, with one process group for each channel.

    Args:
        groups: the process groups, in the order of CHANNELS.
        members: ranks in the whole world, ascending.
        where: rank, size, local rank and local size.
        timeout_s: how long a rank waits for the others.
        parent: the whole world, if this is a part of one.
    """

    def __init__(
        self,
        groups: Sequence[dist.ProcessGroup],
        members: Sequence[int],
        where: Where,
        timeout_s: float,
        parent: Ranks | None = None,
    ) -> None:
        super().__init__(where, timeout_s, parent)
        self.channels = {name: Channel(group) for name, group in zip(CHANNELS, groups, strict=True)}
        self.members = tuple(members)
        self.launches: Launches = parent.launches if isinstance(parent, TorchRanks) else Launches()
        self.watch: Watch | None = parent.watch if isinstance(parent, TorchRanks) else None

    def drive(self, work: Callable[[], object]) -> Flight:
        place = self.launches.place()
        if place is None:
            return self._driver(work)

        def placed() -> object:
            with self.launches.at(place):
                return work()

        return self._driver(placed)

    def sum(self, x: torch.Tensor, name: str) -> Flight:
        self.count(2 * (self.size - 1) / self.size * x.nbytes)
        return self._launch(x, name, lambda group: dist.all_reduce(x, group=group, async_op=True), lambda: x)

    def scatter(self, x: torch.Tensor, name: str) -> Flight:
        self.count((self.size - 1) / self.size * x.nbytes)
        own = x.chunk(self.size)[self.rank]
        if x.is_cuda:
            share = torch.empty_like(own)
            return self._launch(
                x,
                name,
                lambda group: dist.reduce_scatter_single(share, x, group=group, async_op=True),
                lambda: share,
                [share],
            )
        # As over Horovod, the sum is taken in rank order and goes into this rank's share of x.
        out = torch.empty_like(x)
        return self._launch(
            x,
            name,
            lambda group: dist.all_to_all_single(out, x, group=group, async_op=True),
            lambda: add(out.chunk(self.size), own),
        )

    def alltoall(self, x: torch.Tensor, name: str) -> Flight:
        self.count((self.size - 1) / self.size * x.nbytes)
        out = torch.empty_like(x)
        return self._launch(
            x, name, lambda group: dist.all_to_all_single(out, x, group=group, async_op=True), lambda: out, [out]
        )

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        self.count(broadcast_sends(self.rank, root, self.size) * x.nbytes)
        source = self.members[root]
        return self._launch(x, name, lambda group: dist.broadcast(x, source, group=group, async_op=True), lambda: x)

    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Flight:
        """All-gather. torch gathers only equal tensors, so sizes travel first, and then rows are padded to the most
        that any rank has."""
        if equal:
            self.count((self.size - 1) * x.nbytes)
            sent, out = x.contiguous(), x.new_empty(self.size * len(x), *x.shape[1:])
            return self._launch(
                sent,
                name,
                lambda group: dist.all_gather_single(out, sent, group=group, async_op=True),
                lambda: out,
                [out],
            )
        rows: list[int] = []
        made: list[torch.Tensor] = []

        def start(group: dist.ProcessGroup) -> dist.Work:
            own, sizes = torch.tensor([len(x)]), torch.empty(self.size, dtype=torch.int64)
            self.wait(dist.all_gather_single(sizes, own, group=group, async_op=True), name)
            rows.extend(sizes.tolist())
            sent, most = x.contiguous(), max(rows)
            if len(x) < most:
                sent = torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
            padded = x.new_empty(self.size * most, *x.shape[1:])
            made.extend([padded, sent])
            self.count((self.size - 1) * (own.nbytes + sent.nbytes))
            work: dist.Work = dist.all_gather_single(padded, sent, group=group, async_op=True)
            return work

        def finish() -> torch.Tensor:
            padded = made[0]
            if len(set(rows)) == 1:
                return padded
            return torch.cat([part[:count] for part, count in zip(padded.chunk(self.size), rows, strict=True)])

        return self._launch(x, name, start, finish, made, waits=True)

    def adasum(self, x: torch.Tensor, name: str) -> Flight:
        """In place: x, one layer's mean gradient over this rank's tokens, becomes the Adasum of all ranks' x."""
        must_be_power_of_two(self.size)
        self.count((self.size - 1) * x.nbytes)
        flat = x.reshape(-1)
        out = flat.new_empty(self.size * len(flat))
        return self._launch(
            x,
            name,
            lambda group: dist.all_gather_single(out, flat, group=group, async_op=True),
            lambda: x.copy_(adasum(out.chunk(self.size)).view_as(x)),
            [out],
        )

    def lost(self, error: Exception) -> PeerError | None:
        """As World says. NCCL's errors have a class of their own; Gloo's are known by the name of its source file."""
        theirs = isinstance(error, dist.DistError) or "third_party/gloo" in str(error)
        return self._gone(error) if isinstance(error, RuntimeError) and theirs else None

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> TorchRanks:
        raise RuntimeError(f"`{name}` splits a part of a world: split the whole one, as over Horovod")

    def launched(self, future: Future[dist.Work], name: str) -> dist.Work:
        """Waits until a collective is launched, and returns its work. NCCL's first launch waits for all ranks.

        Raises PeerError if a rank is gone, or if the wait takes longer than the timeout.
        """
        end = time.monotonic() + self.timeout_s
        while not future.done():
            wait([future], SLICE.total_seconds())
            if not future.done() and self.watch is not None and (rank := self.watch.gone()) is not None:
                raise PeerError(f"`{name}` waits for rank {rank}, which is gone")
            if time.monotonic() > end and not future.done():
                raise self._late(name)
        return future.result()

    def wait(self, work: dist.Work, name: str, on_host: bool = True) -> None:
        """Waits until `work` is done.

        Args:
            work: of torch.distributed.
            name: of the collective.
            on_host: whether the host waits. On CUDA what follows on the current stream waits instead.
        """
        end = time.monotonic() + self.timeout_s
        while on_host and not work.is_completed():
            try:
                work.wait(SLICE)
            except RuntimeError:
                if not work.is_completed() and time.monotonic() > end:
                    raise self._late(name) from None
        try:
            work.wait()
        except RuntimeError as error:
            raise self._gone(error) from None

    def _gone(self, error: RuntimeError) -> PeerError:
        rank = self.watch.gone(NEWS_S) if self.watch is not None else None
        who = "most likely because another rank is gone" if rank is None else f"because rank {rank} is gone"
        return PeerError(f"a collective failed, {who} ({_first_line(error)})")

    def _late(self, name: str) -> PeerError:
        return PeerError(too_long(self.timeout_s, f"`{name}`"))

    def close(self) -> None:
        """Ends the threads of the channels. Process groups of a part end with the whole world."""
        for channel in self.channels.values():
            channel.close()

    def _launch(
        self,
        x: torch.Tensor,
        name: str,
        start: Callable[[dist.ProcessGroup], dist.Work],
        finish: Callable[[], torch.Tensor],
        made: Sequence[torch.Tensor] = (),
        waits: bool = False,
    ) -> TorchFlight:
        if x.is_cuda:
            group = self.channels["other"].group
            future = self.launches.launch(lambda: start(group), x.device)
        else:
            channel = self.channels.get(name.split(".")[0], self.channels["other"])
            future = channel.launch(lambda: start(channel.group), waits)
        return TorchFlight(future, x, name, self, finish, made)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().partition("\n")[0]  # a C++ stack trace may follow


class TorchWorld(TorchRanks):
    """The ranks that a launcher started, which may be any that detect.py knows.

    Args:
        place: what the environment says of this rank.
        timeout_s: how long a rank waits for the others.
        device_kind: auto, cpu or cuda.
    """

    def __init__(self, place: Place, timeout_s: float, device_kind: str = "cpu") -> None:
        on_gpu = device_kind != "cpu" and torch.cuda.is_available() and dist.is_nccl_available()
        self.timeout_s = timeout_s
        self._backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        if on_gpu:
            torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
        timeout = timedelta(seconds=timeout_s)
        try:
            if place.launcher == "torchrun":
                dist.init_process_group(self._backend, init_method="env://", timeout=timeout)
            else:
                store = meet(place, timeout)
                dist.init_process_group(
                    self._backend, store=store, rank=place.rank, world_size=place.size, timeout=timeout
                )
            groups = [self._group() for _ in CHANNELS]
            ring = dist.new_group(timeout=AGES, backend="gloo") if place.size > 1 else None
        except RuntimeError as error:
            raise PeerError(f"the ranks did not find each other ({_first_line(error)})") from None
        where = (place.rank, place.size, place.local_rank, place.local_size)
        super().__init__(groups, range(place.size), where, timeout_s)
        if ring is not None:
            self.watch = Watch(ring, place.rank, place.size)
            be_patient(timeout_s, self.watch.gone)
        if not on_gpu:
            self.no_cuda = "this torch was built without NCCL and carries no CUDA tensors between ranks"
        self._parts: list[TorchRanks] = []

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> TorchRanks:
        mine = group_of(self.rank, groups, self.size)
        local = self._local(mine, name)
        for group in groups:  # every rank makes all of them, in the same order
            made = [self._group(sorted(group)) for _ in CHANNELS]
            if self.rank in group:
                own = made
        part = TorchRanks(own, mine, (mine.index(self.rank), len(mine), *local), self.timeout_s, self)
        self._parts.append(part)
        return part

    def _group(self, ranks: list[int] | None = None) -> dist.ProcessGroup:
        # Longer than the world's own timeout, so that `wait` gives up first and names the collective.
        timeout = timedelta(seconds=self.timeout_s + 60)
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend=self._backend)
        return group

    def close(self) -> None:
        self._driver.close()
        self.sum(torch.zeros(1), "world.close").land()  # after this no collective of any rank is under way
        for part in self._parts:
            part.close()
        super().close()
        self.launches.close()
        if self.watch is not None:
            self.watch.close()
        dist.destroy_process_group()


# ------------------------------------------------------------------ how ranks meet
def meet(place: Place, timeout: timedelta) -> Store:
    """Connects to a key-value store that rank 0 opens. Collective.

    The address of the store travels through Horovod's own key-value server, or as a broadcast over MPI, depending on
    the launcher.
    """
    if "HOROVOD_GLOO_IFACE" in os.environ:
        os.environ.setdefault(IFACE, os.environ["HOROVOD_GLOO_IFACE"])
    store = None
    address: tuple[str, int] | None = None
    if place.rank == 0:
        host = own_address(place)
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=timeout)
        address = (host, store.port)
    if place.launcher == "horovodrun":
        address = through_horovodrun(address, timeout)
    elif place.launcher in ("mpirun", "srun"):
        address = through_mpi(address, place)
    if store is None:
        assert address is not None, "a process alone is rank 0"
        store = TCPStore(*address, is_master=False, wait_for_workers=False, timeout=timeout)
    return store


def own_address(place: Place) -> str:
    """The address or name by which other ranks reach this host.

    It is MASTER_ADDR if that is set, else the address of the interface that Gloo is told to use, else the loopback if
    all ranks are on this host, else the host's name.
    """
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"]
    if IFACE in os.environ:
        return address_of(os.environ[IFACE].split(",")[0])
    return "127.0.0.1" if place.local_size == place.size else socket.gethostname()


def address_of(interface: str) -> str:
    """The IPv4 address of a network interface (ioctl SIOCGIFADDR with 16 bytes of name, then a sockaddr_in)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            raise UserError(f"{IFACE}={interface} names no network interface with an IPv4 address here") from None
    return socket.inet_ntoa(found[20:24])


def through_horovodrun(address: tuple[str, int] | None, timeout: timedelta) -> tuple[str, int]:
    """Passes the address of rank 0 through the key-value server of horovodrun.

    Args:
        address: host and port on rank 0, None elsewhere.
        timeout: how long the other ranks wait for it.
    """
    try:
        server = f"http://{os.environ['HOROVOD_GLOO_RENDEZVOUS_ADDR']}:{os.environ['HOROVOD_GLOO_RENDEZVOUS_PORT']}"
    except KeyError:
        raise UserError("horovodrun started this without its key-value server: add --gloo, or use torchrun") from None
    url, end = f"{server}/hvdllm/store", time.monotonic() + timeout.total_seconds()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    if address is not None:
        words = f"{address[0]} {address[1]}".encode()
        direct.open(urllib.request.Request(url, words, method="PUT"), timeout=timeout.total_seconds()).close()
        return address
    while True:
        try:
            with direct.open(url, timeout=timeout.total_seconds()) as answer:
                host, port = answer.read().decode().split()
                return host, int(port)
        except urllib.error.HTTPError as error:
            if error.code != 404 or time.monotonic() > end:
                raise PeerError(f"rank 0 left no address with horovodrun's server ({error})") from None
            error.close()
        except OSError as error:
            raise PeerError(f"horovodrun's server does not answer ({error})") from None
        time.sleep(0.02)


def through_mpi(address: tuple[str, int] | None, place: Place) -> tuple[str, int]:
    """Broadcasts the address of rank 0 over MPI. Raises UserError if mpi4py is missing, or built for another MPI."""
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            f"world=torch under {place.launcher} meets over MPI and needs mpi4py: pip install mpi4py, or use torchrun"
        ) from None
    if (size := MPI.COMM_WORLD.size) != place.size:
        raise UserError(
            f"the launcher says {place.size} ranks, mpi4py sees {size}: it was built for another MPI; use torchrun"
        )
    met: tuple[str, int] = MPI.COMM_WORLD.bcast(address, root=0)
    return met


def opened(setup: Setup, place: Place) -> TorchWorld:
    """The world of the ranks that the launcher of this process started."""
    return TorchWorld(place, setup.config.world.timeout_s, setup.config.device.kind)
