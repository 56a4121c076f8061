"""Where a GPU is told from a CPU: choosing it, reading it late, telling time on it.

Its rules for threads and streams, which the rest of the package keeps by calling this file:
    threads  every thread starts on GPU 0; those that we start begin on their parent's (`pool`, `start_thread`)
    events   are recorded on a stream of the tensor's own device (`Later`, `Mark`)
    memory   returns to the stream it was made on once the last reference is gone, whatever other streams still do with
             it; so what arrives from another stream is recorded on the one that uses it (`used_here`)

Not yet run on a GPU: the CUDA branches. tests/cuda runs them on fake CUDA tensors.
"""

from __future__ import annotations

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
from typing import TypeVar

import torch

from hvdllm.errors import PeerError, UserError

_told = threading.local()
T = TypeVar("T")
_patience_s = math.inf  # of a wait for a GPU that may itself wait for another rank's


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
def be_patient(seconds: float) -> None:
    """From here on no wait for a GPU is longer: world.timeout_s, where there are other ranks."""
    global _patience_s
    _patience_s = seconds


def wait_for(event: torch.cuda.Event) -> None:
    """The host waits until what the event marks is done, by poll and sleeps of 20 µs to 1 ms, so that it hears signals.
    Raises PeerError after `be_patient`'s seconds: a kernel of NCCL whose peer is gone runs for ever."""
    pause, begin = 2e-5, time.monotonic()
    while not event.query():
        if time.monotonic() - begin > _patience_s:
            raise PeerError(
                f"the GPU has been busy for {_patience_s:.0f} s (world.timeout_s), most likely because it waits for a "
                "rank that is gone or stands still"
            )
        time.sleep(pause)
        pause = min(1.5 * pause, 1e-3)


def wait_for_stream(device: torch.device) -> None:
    """The host waits for all that the current stream of a CUDA device holds."""
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
    """Cores this process may run on (an affinity mask counts)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
