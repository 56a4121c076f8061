"""What most exchanges have in common: their facts, and what they keep."""

from __future__ import annotations

from typing import Generic, TypeVar

from hvdllm.exchange import parts as exchanges
from hvdllm.exchange.base import Milestones, Watch
from hvdllm.exchange.tally import Tally
from hvdllm.world.base import World

S = TypeVar("S", bound=exchanges.Exchange)


class Common(Generic[S]):
    """The defaults of the Exchange protocol. settings: of this exchange; nominal: tokens of a global batch."""

    anchored = False
    marks_on_ask = False
    resized = ""
    unlike = False
    milestones = Milestones()

    def __init__(self, settings: S, nominal: int) -> None:
        self.settings, self.nominal = settings, nominal
        self.tally = Tally()

    @property
    def tokens(self) -> int:
        return self.tally.tokens

    @property
    def step(self) -> int:
        return self.tally.step

    @property
    def watch(self) -> Watch | None:
        return self.tally.watch

    @watch.setter
    def watch(self, watch: Watch | None) -> None:
        self.tally.watch = watch

    def between(self, world: World) -> World:
        return world

    def disarm(self) -> None:
        """There are no hooks."""
