"""Where a GPU is told from a CPU: choosing it, reading it late, telling time on it.

Its rules for threads and streams, which the rest of the package keeps by calling this file:
    threads  every thread starts on GPU 0; those that we start begin on their parent's (`pool`, `start_thread`)
    events   are recorded on a stream of the tensor's own device (`Later`, `Mark`)
    memory   returns to the stream it was made on once the last reference is gone, whatever other streams still do with
             it; so what arrives from another stream is recorded on the one that uses it (`used_here`)

Not yet run on a GPU: the CUDA branches. tests/cuda runs them on fake CUDA tensors.
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

from hvdllm.errors import PeerError, UserError

_told = threading.local()
T = TypeVar("T")
LAST_S = 10.0  # that a GPU may still need, once a rank has gone, for work that did not wait for that rank
_patience_s = math.inf  # of a wait for a GPU that may itself wait for another rank's


def nobody() -> int | None:
    """The rank that has gone, in a world that watches none."""
    return None


_gone = nobody  # or what `be_patient` was given


def now() -> float:
    """Seconds on this thread's clock: the host's, or a simulated one."""
    return float(_told.clock()) if simulated() else time.perf_counter()


def simulated() -> bool:
    """Is time simulated for this thread?"""
    return hasattr(_told, "clock")


def tell_time_by(clock: Callable[[], float]) -> None:
    """From here on `now` is what `clock` says, for the calling thread (world/virtual.py)."""
    _told.clock = clock


class Later:
    """Numbers of a device tensor, read by the host later: copied through pinned memory, no stall of the stream.

    x: a small tensor; its values at the time of the call count.
    """

    def __init__(self, x: torch.Tensor) -> None:
        if x.is_cuda:
            self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.host.copy_(x, non_blocking=True)
            self.event = torch.cuda.current_stream(x.device).record_event()
        else:
            self.host = x.clone()

    def read(self) -> list[float]:
        """The values. On CUDA waits until the copy, and no later work, is done."""
        if hasattr(self, "event"):
            wait_for(self.event)
        values: list[float] = self.host.reshape(-1).tolist()
        return values


class Mark:
    """A point in time: of the host, or on CUDA of the current stream (an event), since the host runs ahead there; where
    time is simulated, of that."""

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and not simulated():
            self.event = torch.cuda.Event(enable_timing=True)
            self.event.record(torch.cuda.current_stream(device))
        else:
            self.time = now()

    def until(self, later: Mark) -> float:
        """Seconds between the two. On CUDA both must have passed: read it a round later."""
        if hasattr(self, "event"):
            wait_for(later.event)
            return float(self.event.elapsed_time(later.event)) / 1e3
        return later.time - self.time


# ------------------------------------------------------------------ waiting, streams and threads
def be_patient(seconds: float, gone: Callable[[], int | None] = nobody) -> None:
    """From here on no wait for a GPU is longer: world.timeout_s, where there are other ranks. gone: says which of them
    has ended, None: none that is known of; then a wait ends at once."""
    global _patience_s, _gone
    _patience_s, _gone = seconds, gone


def wait_for(event: torch.cuda.Event) -> None:
    """The host waits until what the event marks is done, by poll and sleeps of 20 µs to 1 ms, so that it hears signals.
    Raises PeerError after `be_patient`'s seconds, or when a rank has gone: a kernel of NCCL that waits for it runs for
    ever."""
    pause, begin, due = 2e-5, time.monotonic(), 0.1
    while not event.query():
        waited = time.monotonic() - begin
        if waited > due:  # rarely, and late enough for work that the others had finished before
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
    """The host waits for all that the current stream of a CUDA device holds; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        wait_for(torch.cuda.current_stream(device).record_event())


def used_here(value: T) -> T:
    """Records every CUDA tensor in `value`, however deep in lists, tuples, dicts and dataclasses, on the current stream
    of its device: its memory is not given away before this stream is done with it. Returns the value."""
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
    """One thread that runs what is submitted, in order, on the GPU of the thread that calls this."""
    return ThreadPoolExecutor(1, thread_name_prefix=f"hvdllm-{name}", initializer=_same_gpu())


def start_thread(work: Callable[[], None], name: str) -> None:
    """A daemon thread that runs `work` on the GPU of the thread that calls this."""
    settle = _same_gpu()

    def run() -> None:
        settle()
        work()

    threading.Thread(target=run, name=f"hvdllm-{name}", daemon=True).start()


def _same_gpu() -> Callable[[], None]:
    """What a new thread calls first."""
    if not torch.cuda.is_initialized():
        return lambda: None
    index = torch.cuda.current_device()
    return lambda: torch.cuda.set_device(index)


# ------------------------------------------------------------------ the device
def usable_memory(device: torch.device) -> int | None:
    """Bytes that this process and those beside it can still take: of the host, or all there are on the GPU. None:
    unknown. A container's limit (cgroup v2) counts where it is the smaller one."""
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
        except (OSError, ValueError):  # there is no limit
            continue
    return free


def cgroups() -> list[Path]:
    """The folders of this process's control group (v2) and of those around it."""
    try:
        found = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return []
    own = Path("/sys/fs/cgroup") / found.lstrip("/")
    return [folder for folder in (own, *own.parents) if folder.is_relative_to("/sys/fs/cgroup")]


def choose(kind: str, local_rank: int, *, share: bool = False, no_cuda: str = "") -> torch.device:
    """auto, cpu or cuda as this process's device. A rank takes the GPU of its local rank; where it sees a single one
    (srun --gpus-per-task, a slice of MIG), that. share: may there be fewer GPUs than ranks? no_cuda: why the
    world carries no CUDA tensors; "": it does. Raises UserError where CUDA is asked for and cannot be had."""
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
    """What tells this GPU from all others; "" for a CPU. Slices of MIG may share their GPU's number."""
    if device.type != "cuda":
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    slice_ = f" {visible}" if visible.startswith("MIG-") else ""
    return f"{torch.cuda.get_device_properties(device).uuid}{slice_}"


def usable_cores() -> int:
    """Cores this process may run on: an affinity mask counts, and the quota of a container."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return math.ceil(min(found, quota()))


def quota() -> float:
    """Cores that the control groups around this process (v2, else v1) leave it in the mean; infinite without one."""
    found = math.inf
    for folder in cgroups():
        with contextlib.suppress(OSError, ValueError):
            most, period = (folder / "cpu.max").read_text().split()
            found = min(found, int(most) / int(period))  # "max": there is none
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
        most, period = (Path(f"/sys/fs/cgroup/cpu/cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        found = min(found, int(most) / int(period)) if int(most) > 0 else found
    return found


def fair_share(ranks: int, apart: int | None = None) -> int:
    """Cores for one of so many ranks on this host. apart: of a rank, where the launcher gave each its own.

    Ranks that are bound to cores have them for themselves; what binds them is not bound itself, so its cores are those
    of all ranks here.
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
    """The GPU's or the CPU's name."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Bytes this process held at most: of GPU memory, or resident on the host."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
