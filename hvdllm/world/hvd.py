"""The world over Horovod: the one module that imports horovod.torch and initialises it.

Rules it keeps (each learnt from a failure): no fusion and no autotune (our buckets are the fusion, and fusing
by timing changes the order of sums, so from 3 ranks on two equal runs would differ); waiting is polling with
short sleeps (hvd.synchronize spins and steals a core from the compute); a collective that fails because
another rank is gone is not this rank's error.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from hvdllm.errors import PeerError, UserError
from hvdllm.world.base import Asks, Flight, first_problem
from hvdllm.world.detect import Place

os.environ["HOROVOD_FUSION_THRESHOLD"] = "0"
os.environ.pop("HOROVOD_AUTOTUNE", None)

try:
    import horovod.torch as hvd
    from horovod.common.exceptions import HorovodInternalError
except ImportError as error:
    raise UserError(
        f"Horovod cannot be imported ({error}): run jobs/setup.sh from a clone of hvdllm, or start one process alone"
    ) from None


class HorovodFlight:
    """One collective; `land` waits by poll and sleeps of 20 µs to 1 ms."""

    def __init__(self, handle: int, name: str, world: HorovodWorld) -> None:
        self.handle, self.name, self.world = handle, name, world
        self.value: torch.Tensor | None = None

    def landed(self) -> bool:
        return self.value is not None or bool(_peer_errors(lambda: hvd.poll(self.handle)))

    def land(self) -> torch.Tensor:
        if self.value is None:
            pause, end = 2e-5, time.monotonic() + self.world.timeout_s
            while not self.landed():
                if time.monotonic() > end:
                    raise PeerError(
                        f"rank {self.world.rank} waited {self.world.timeout_s:.0f} s for `{self.name}`: another rank "
                        "stands still, or acts take longer than world.timeout_s"
                    )
                time.sleep(pause)
                pause = min(1.5 * pause, 1e-3)
            self.value = _peer_errors(lambda: hvd.synchronize(self.handle))
        return self.value


def _peer_errors(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    try:
        return call()
    except HorovodInternalError as error:
        raise PeerError(f"a collective failed, most likely because another rank is gone ({error})") from None


class HorovodWorld:
    """The ranks that a launcher started; `place` is what its environment says of this one."""

    def __init__(self, place: Place, timeout_s: float) -> None:
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        if (self.rank, self.size) != (place.rank, place.size):
            raise UserError(
                f"the launcher says rank {place.rank} of {place.size}, Horovod says {self.rank} of {self.size}: "
                "this Horovod was built for another launcher; `hvdllm doctor` shows its controllers"
            )
        self.timeout_s = timeout_s
        self.asks = Asks()
        self.bytes_sent = 0.0

    def sum(self, x: torch.Tensor, name: str) -> Flight:
        self.bytes_sent += 2 * (self.size - 1) / self.size * x.nbytes
        return HorovodFlight(hvd.allreduce_async_(x, name=name, op=hvd.Sum), name, self)

    def gather(self, x: torch.Tensor, name: str) -> Flight:
        self.bytes_sent += (self.size - 1) * x.nbytes
        return HorovodFlight(hvd.allgather_async(x, name=name), name, self)

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Flight:
        self.bytes_sent += (self.size - 1) * x.nbytes if self.rank == root else 0
        return HorovodFlight(hvd.broadcast_async_(x, root, name=name), name, self)

    def texts(self, text: str, name: str) -> list[str]:
        own = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        lengths = self.gather(torch.tensor([own.numel()]), f"{name}.lengths").land().tolist()
        parts = self.gather(own, f"{name}.bytes").land().split(lengths)
        return [bytes(part.tolist()).decode().rstrip("\0") for part in parts]

    def agree(self, problem: str | None, name: str) -> None:
        if said := first_problem(self.texts(problem or "", name)):
            raise UserError(said)

    def close(self) -> None:
        self.sum(torch.zeros(1), "world.close").land()
        hvd.shutdown()
