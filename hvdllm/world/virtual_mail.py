"""Letters between logical ranks, and threads beside the loop of a logical rank, which are deterministic lanes.

Without a simulated clock a letter arrives at once, and the rank that takes it goes on one second later than the sender.
With a clock a letter occupies links as a collective does, and is taken when it has arrived.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from typing import Protocol

import torch

from hvdllm.device import start_thread
from hvdllm.errors import PeerError
from hvdllm.plain import Json
from hvdllm.world.base import Asks, Letter
from hvdllm.world.hub import Hub, Lane
from hvdllm.world.mail import copied


class Logical(Protocol):
    """What letters need of a logical rank."""

    rank: int
    asks: Asks
    hub: Hub

    def count(self, sent: float) -> None: ...

    def texts(self, text: str, name: str) -> list[str]: ...


class VirtualMail:
    """The mail of a logical rank. It calls `meanwhile` only if something is asked of this rank while it waits."""

    def __init__(self, world: Logical) -> None:
        self.world, self.hub = world, world.hub
        self.links = world.hub.links

    def post(self, to: int, box: str, head: Json, body: torch.Tensor | None = None) -> None:
        letter = copied(self.world.rank, head, body)
        if to != self.world.rank and letter.body is not None:
            self.world.count(letter.body.nbytes)
        assert self.hub.holder is not None
        at = self.hub.holder.time
        if self.links is None:
            at += 1
        elif to != self.world.rank:
            at = self.hub.carry([self.world.rank], [to], 0 if letter.body is None else letter.body.nbytes)
        self.hub.posted += 1
        insort(self.hub.letters.setdefault((to, box), []), (at, self.hub.posted, letter))

    def take(self, box: str, meanwhile: Callable[[], None] | None = None) -> Letter:
        letters, asks = self.hub.letters.setdefault((self.world.rank, box), []), self.world.asks
        listens = meanwhile is not None

        def asked() -> bool:
            return listens and (asks.stop or asks.save)

        def arrival() -> float:
            return letters[0][0] if letters and self.links is not None else 0.0

        assert self.hub.holder is not None
        while not letters or arrival() > self.hub.holder.time:
            self.hub.wait(lambda: bool(letters) or asked() or over(self.hub), lambda: f"a letter in `{box}`", arrival)
            if letters:
                continue
            if asked() and meanwhile is not None:
                meanwhile()
                listens = not asked()  # `meanwhile` has not taken what was asked, so it need not be called again
            elif over(self.hub):
                raise PeerError("all ranks have left")
        at, _, letter = letters.pop(0)
        self.hub.holder.time = max(self.hub.holder.time, at)
        return letter

    def close(self) -> None:
        self.world.texts("", "mail.close")


def over(hub: Hub) -> bool:
    """Whether the own threads of all ranks have ended."""
    return not any(lane.number == 0 for lane in hub.lanes)


def spawn(hub: Hub, lane: Lane, work: Callable[[], None], name: str) -> None:
    """Starts a thread that takes part in passing the baton. Its clock begins at the time of the calling thread.

    Args:
        hub: what the ranks share.
        lane: a new lane, for this thread.
        work: what the thread does.
        name: of the thread.
    """
    assert hub.holder is not None
    lane.time = hub.holder.time
    hub.lanes.append(lane)

    def run() -> None:
        hub.tell_time()
        try:
            hub.enter(lane)
            work()
        except PeerError as error:
            if not over(hub):
                hub.fail(error)
        except BaseException as error:
            hub.fail(error)
        finally:
            hub.leave(lane)

    start_thread(run, f"{name}-{lane.rank}")
