"""A world of one rank, which is this process alone. Nothing travels, and Horovod is not imported."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hvdllm.errors import UserError
from hvdllm.settings import Setup
from hvdllm.world.base import Asks
from hvdllm.world.detect import Place
from hvdllm.world.mail import OwnMail, Threads


class Landed:
    """A flight that has arrived."""

    def __init__(self, value: object) -> None:
        self.value = value

    def landed(self) -> bool:
        return True

    def land(self) -> Any:
        return self.value


class SingleWorld:
    """The world of a process alone, in which every collective returns its argument."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    bytes_sent = 0.0
    no_cuda = ""

    def __init__(self) -> None:
        self.asks = Asks()
        self.threads = Threads(math.inf)

    def sum(self, x: torch.Tensor, name: str) -> Landed:
        return Landed(x)

    def scatter(self, x: torch.Tensor, name: str) -> Landed:
        return Landed(x)

    def gather(self, x: torch.Tensor, name: str, equal: bool = False) -> Landed:
        return Landed(x)

    def alltoall(self, x: torch.Tensor, name: str) -> Landed:
        return Landed(x)

    def broadcast(self, x: torch.Tensor, name: str, root: int = 0) -> Landed:
        return Landed(x)

    def adasum(self, x: torch.Tensor, name: str) -> Landed:
        return Landed(x)

    def split(self, groups: Sequence[tuple[int, ...]], name: str) -> SingleWorld:
        return self

    def drive(self, work: Callable[[], object]) -> Landed:
        return Landed(work())

    def mail(self) -> OwnMail:
        return OwnMail(self.threads)

    def spawn(self, work: Callable[[], None], name: str) -> None:
        self.threads.spawn(work, name)

    def rest(self, seconds: float) -> None:
        time.sleep(seconds)

    def texts(self, text: str, name: str) -> list[str]:
        return [text]

    def agree(self, problem: str | None, name: str) -> None:
        if problem:
            raise UserError(problem)

    def lost(self, error: Exception) -> None:
        return None

    def close(self) -> None:
        pass


def opened(setup: Setup, place: Place) -> SingleWorld:
    """The world of this process alone."""
    return SingleWorld()
