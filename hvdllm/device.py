"""Everything that differs between GPUs and CPUs: choosing a device, reading from it later, and telling time on it.

The rest of the package keeps three rules for threads and streams by calling this file:
    threads  torch starts every thread on GPU 0; `pool` and `start_thread` start threads on their parent's GPU
    events   are recorded on a stream of the tensor's own device (`Later`, `Mark`)
    memory   returns to the stream on which it was made once its last reference is gone, even if other streams still
             use it; so a tensor from another stream is recorded on the stream that uses it (`used_here`)

The CUDA branches have not yet run on a GPU. tests/cuda runs them on fake CUDA tensors.
"""

from __future__ import annotations

import contextlib
import math
import os
import platform
import resource
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar

import torch

from hvdllm import pulse
from hvdllm.errors import PeerError, UserError

_told = threading.local()
T = TypeVar("T")
LAST_S = 10.0  # seconds that a GPU may still need, after a rank is gone, for work that does not wait for that rank
_patience_s = math.inf  # the longest wait for a GPU, which may itself wait for another rank's


def nobody() -> int | None:
    """The rank that is gone, for a world that watches none: always None."""
    return None


_gone = nobody  # replaced by `be_patient`


def now() -> float:
    """Seconds on the clock of the calling thread, which is the host's or a simulated one."""
    return float(_told.clock()) if simulated() else time.perf_counter()


def simulated() -> bool:
    """Whether time is simulated for the calling thread."""
    return hasattr(_told, "clock")


def tell_time_by(clock: Callable[[], float]) -> None:
    """Makes `clock` the time that `now` tells the calling thread (world/virtual.py)."""
    _told.clock = clock


class Later:
    """Numbers of a device tensor that the host reads later. They are copied to pinned memory without a stall.

    Args:
        x: a small tensor, whose values at the time of the call count.
    """

    def __init__(self, x: torch.Tensor) -> None:
        if x.is_cuda:
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.host.copy_(x, non_blocking=True)
            self.event = torch.cuda.current_stream(x.device).record_event()
        else:
            self.host = x.clone()

    def read(self) -> list[float]:
        """The values in a flat list. On CUDA this waits for the copy, but for no later work."""
        if hasattr(self, "event"):
            wait_for(self.event)
        values: list[float] = self.host.reshape(-1).tolist()
        return values


class Mark:
    """A point in time on a device.

    It is a time of the host, or on CUDA an event of the current stream, since the host runs ahead of the device. If
    time is simulated, it is a simulated time.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and not simulated():
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.time = now()

    def until(self, later: Mark) -> float:
        """Seconds from this mark to a later one. On CUDA this waits for the later one, so read it a round later."""
        if hasattr(self, "event"):
            wait_for(later.event)
            return float(self.event.elapsed_time(later.event)) / 1e3
        return later.time - self.time


# ------------------------------------------------------------------ waiting, streams and threads
def be_patient(seconds: float, gone: Callable[[], int | None] = nobody) -> None:
    """Limits waits for a GPU, which may itself wait for other ranks.

    Args:
        seconds: the longest wait from here on (world.timeout_s).
        gone: returns a rank that is known to be gone, which ends waits, or None.
    """
    global _patience_s, _gone
    _patience_s, _gone = seconds, gone


def wait_for(event: torch.cuda.Event) -> None:
    """Waits on the host for an event. It polls, with sleeps of 20 µs to 1 ms, so that signals are handled.

    Raises PeerError after the seconds of `be_patient`, or if a rank is gone, since an NCCL kernel that waits for that
    rank runs for ever.
    """
    with pulse.waiting("work of its GPU"):
        _wait_for(event)


def _wait_for(event: torch.cuda.Event) -> None:
    pause, begin, due = 2e-5, time.monotonic(), 0.1
    while not event.query():
        waited = time.monotonic() - begin
        if waited > due:  # asked rarely, and only in waits that are not short
            due = waited + 0.1
            if (rank := _gone()) is not None and not _done_within(event, LAST_S):
                raise PeerError(f"the GPU waits for rank {rank}, which is gone")
        if waited > _patience_s:
            raise PeerError(
                f"the GPU has been busy for {_patience_s:.0f} s (world.timeout_s), most likely because it waits for a "
                "rank that is gone or stands still"
            )
        time.sleep(pause)
        pause = min(1.5 * pause, 1e-3)


def _done_within(event: torch.cuda.Event, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > end:
            return False
        time.sleep(1e-3)
    return True


def wait_for_stream(device: torch.device) -> None:
    """Waits on the host for all that the current stream of a CUDA device holds. On a CPU it returns at once."""
    if device.type == "cuda":
        wait_for(torch.cuda.current_stream(device).record_event())


def used_here(value: T) -> T:
    """Records every CUDA tensor in `value` on the current stream of its device, and returns `value`.

    The memory of the tensors is then not reused before that stream is done with it. Tensors are found at any depth in
    lists, tuples, dicts and dataclasses.
    """
    if isinstance(value, torch.Tensor):
        if value.is_cuda:
            value.record_stream(torch.cuda.current_stream(value.device))
    elif isinstance(value, (list, tuple)):
        for each in value:
            used_here(each)
    elif isinstance(value, dict):
        used_here(list(value.values()))
    elif is_dataclass(value):
        used_here([getattr(value, each.name) for each in fields(value)])
    return value


def pool(name: str) -> ThreadPoolExecutor:
    """An executor of one thread, which runs what is submitted in order, on the GPU of the calling thread."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"hvdllm-{name}", initializer=_same_gpu())


def start_thread(work: Callable[[], None], name: str) -> None:
    """Starts a daemon thread that runs `work` on the GPU of the calling thread."""
    settle = _same_gpu()

    def run() -> None:
        settle()
        work()

    threading.Thread(target=run, name=f"hvdllm-{name}", daemon=True).start()


def _same_gpu() -> Callable[[], None]:
    """A function that a new thread calls first, so that it uses the GPU of the thread that called this one."""
    if not torch.cuda.is_initialized():
        return lambda: None
    index = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(index)


# ------------------------------------------------------------------ the device
def usable_memory(device: torch.device) -> int | None:
    """The bytes of memory that can be used, or None if that is not known.

    On a GPU this is all its memory. On the host it is what this and other processes can still take; the limit of a
    container (cgroup v2) counts if it is smaller.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = sum(int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "SwapFree"))
    except (OSError, KeyError, ValueError):
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    for folder in cgroups():
        try:
            limit, used = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
            free = min(free, max(0, int(limit) - int(used)))
        except (OSError, ValueError):  # this group has no limit
            continue
    return free


def cgroups() -> list[Path]:
    """The folders of this process's control group (v2) and of the groups that contain it."""
    try:
        found = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    own = Path("/sys/fs/cgroup") / found.lstrip("/")
    return [folder for folder in (own, *own.parents) if folder.is_relative_to("/sys/fs/cgroup")]


def choose(kind: str, local_rank: int, *, share: bool = False, no_cuda: str = "") -> torch.device:
    """Chooses the device of this process.

    A rank takes the GPU with the number of its local rank. If it sees only one (srun --gpus-per-task, a MIG slice), it
    takes that.

    Args:
        kind: auto, cpu or cuda.
        local_rank: of this rank.
        share: whether several ranks may use one GPU.
        no_cuda: why the world carries no CUDA tensors, or "" if it does.

    Raises UserError if CUDA is asked for and not available.
    """
    here = torch.cuda.is_available()
    if kind == "cpu" or (kind == "auto" and (no_cuda or not here)):
        return torch.device("cpu")
    if not here:
        raise UserError(
            "device=cuda: this machine has no GPU that torch can use; take device=cpu, or see `hvdllm doctor`"
        )
    if no_cuda:
        raise UserError(f"device=cuda: {no_cuda}; see `hvdllm doctor`, or take device=cpu")
    count = torch.cuda.device_count()
    if local_rank >= count > 1 and not share:
        raise UserError(
            f"device=cuda: {count} GPUs here, too few for local rank {local_rank}: start at most one rank a GPU"
        )
    torch.cuda.set_device(local_rank % count)
    return torch.device("cuda", local_rank % count)


def gpu(device: torch.device) -> str:
    """What identifies a GPU among all others, or "" for a CPU. MIG slices may share the number of their GPU."""
    if device.type != "cuda":
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    slice_ = f" {visible}" if visible.startswith("MIG-") else ""
    return f"{torch.cuda.get_device_properties(device).uuid}{slice_}"


def usable_cores() -> int:
    """The number of cores that this process may use. Its affinity mask counts, and so does the quota of a container."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(found, quota()))


def quota() -> float:
    """The number of cores that control groups (v2, else v1) allow this process on average; infinite without a quota."""
    found = math.inf
    for folder in cgroups():
        with contextlib.suppress(OSError, ValueError):
            most, period = (folder / "cpu.max").read_text().split()
            found = min(found, int(most) / int(period))  # "max", which means no quota, raises ValueError
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        most, period = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        found = min(found, int(most) / int(period)) if int(most) > 0 else found
    return found


def fair_share(ranks: int, apart: int | None = None) -> int:
    """The number of cores for one of several ranks on this host.

    Ranks that are bound to cores have these for themselves. Their parent, which bound them, is not bound itself, so its
    cores are those of all ranks here.

    Args:
        ranks: how many ranks are on this host.
        apart: cores of each rank, if the launcher gave each its own.
    """
    mine = usable_cores()
    everybodys: float = mine
    if apart is not None:
        everybodys = apart * ranks
    elif hasattr(os, "sched_getaffinity"):
        with contextlib.suppress(OSError):
            everybodys = max(mine, len(os.sched_getaffinity(os.getppid())))
    return max(1, min(mine, math.ceil(min(everybodys, quota())) // ranks))


def name(device: torch.device) -> str:
    """The name of the GPU's or the CPU's model."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held, of GPU memory or resident on the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
