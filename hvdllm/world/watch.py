"""Notices that a rank of torch.distributed has ended, also while the GPU waits for it in an NCCL kernel.

Every rank keeps one receive open, over Gloo, from the rank before it. Nothing arrives while that rank lives. When its
process ends, for whatever reason, its connections close and the receive fails. The rank after it then sends the number
of the lost rank along the ring, so that all ranks name the same one. A host that loses its power closes no connection.
In that case `world.timeout_s` decides.
"""

from __future__ import annotations

import contextlib
import threading
from datetime import timedelta

import torch
import torch.distributed as dist

from hvdllm.device import start_thread

ALL_LEFT = -1  # sent instead of a rank's number once the world closes in good order
AGES = timedelta(days=3650)  # the group's own limit, since nothing arrives while all ranks live


class Watch:
    """The ring of a world of two ranks or more.

    Args:
        group: a process group of Gloo that nothing else uses.
        rank: this rank.
        size: how many ranks there are.
    """

    def __init__(self, group: dist.ProcessGroup, rank: int, size: int) -> None:
        self._group, self._before, self._after = group, (rank - 1) % size, (rank + 1) % size
        self._gone: int | None = None
        self._heard = threading.Event()
        start_thread(self._listen, "watch")

    def gone(self, within_s: float = 0.0) -> int | None:
        """The rank that is gone, or None. within_s: how many seconds to wait for the news."""
        self._heard.wait(within_s)
        return self._gone

    def close(self) -> None:
        """Ends the receives of all ranks, and returns when this rank's has ended. Collective."""
        self._pass_on(ALL_LEFT)
        self._heard.wait()

    def _listen(self) -> None:
        said = torch.empty(1, dtype=torch.int64)
        try:
            dist.recv(said, self._before, group=self._group)
            number = int(said)
        except RuntimeError:
            number = self._before
        if number != ALL_LEFT:
            self._gone = number
            self._pass_on(number)
        self._heard.set()

    def _pass_on(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):  # the ring ends at the rank that is gone
            dist.send(torch.tensor([number]), self._after, group=self._group)
