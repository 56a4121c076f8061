"""Waits for text, and hears meanwhile what ranks are asked.

If a rank is asked to stop or to save while it waits, rank 0 announces a pause: all ranks then stand before the same
round, save there, and go on or end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from hvdllm import pulse, untrusted
from hvdllm.errors import RunError
from hvdllm.world.base import Asks

POLL_S = 0.02
TELL_S = 10.0  # seconds of waiting after which the user is told
MOST = 2**20  # bytes of the files in which ranks tell each other of asks


class Pauses:
    """What ranks that wait are asked, and what rank 0 announces of it, in files that belong to one life of a run."""

    def __init__(self, folder: Path, life: str, rank: int) -> None:
        self.folder, self.life, self.rank = folder, life, rank
        self._heard = 0

    def _file(self, rank: int) -> Path:
        return self.folder / f"asked-{self.life}-{rank}.jsonl"

    def ask(self, asks: Asks) -> None:
        """Passes on what this rank is asked. Raises RunError if the disk refuses."""
        if asks.stop or asks.save:
            self._append(self._file(self.rank), asks)

    def asked(self, size: int) -> Asks:
        """On rank 0: what all ranks have passed on since the last call."""
        found = Asks()
        for rank in range(1, size):
            try:
                lines = untrusted.read(self._file(rank), MOST).splitlines()
                self._file(rank).unlink()
            except (OSError, untrusted.Unfit):
                continue
            for stop, save in map(json.loads, lines):
                found.stop, found.save = found.stop or stop, found.save or save
        return found

    def announce(self, asks: Asks) -> None:
        """On rank 0: all ranks act on this before the round that they wait for. Raises RunError if the disk refuses."""
        self._append(self.folder / f"pauses-{self.life}.jsonl", asks)
        self._heard += 1

    @staticmethod
    def _append(path: Path, asks: Asks) -> None:
        try:
            with untrusted.appended(path) as file:
                file.write(json.dumps([asks.stop, asks.save]) + "\n")
        except (OSError, untrusted.Unfit) as error:
            raise RunError(
                f"{path} cannot be written ({error}), so the other ranks do not hear that this one was asked to stop "
                "or to save: make room, the same command goes on from the last checkpoint"
            ) from None

    def heard(self) -> Asks | None:
        """On the other ranks: the next announcement, once."""
        try:
            lines = untrusted.read(self.folder / f"pauses-{self.life}.jsonl", MOST).split(b"\n")[:-1]
        except (OSError, untrusted.Unfit):
            return None
        if len(lines) <= self._heard:
            return None
        self._heard += 1
        return Asks(*json.loads(lines[self._heard - 1]))


class Waiting:
    """Where a rank waits for the next round.

    Args:
        asks: what this rank is asked.
        pauses: how ranks agree on asks while they wait.
        rank, size: this rank, and the number of ranks.
        rest: waits for so many seconds, as World.rest.
        say: gets a sentence when rank 0 has to wait for long.

    Attributes:
        paused: is called on all ranks, before the same round, with what was asked.
        waited_s: seconds that this rank has waited for data.
    """

    def __init__(
        self, asks: Asks, pauses: Pauses, rank: int, size: int, rest: Callable[[float], None],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:  # fmt: skip
        self.asks, self.pauses, self.rank, self.size, self.rest, self.say = asks, pauses, rank, size, rest, say
        self.paused: Callable[[Asks], None] = lambda asks: None
        self.waited_s = 0.0
        self._quiet = 0.0  # seconds that were waited since the last round
        self._ended = False  # all ranks were asked to stop, because nothing more comes

    def until(self, ready: Callable[[float], bool], over: Callable[[], bool]) -> bool:
        """Waits, and acts on what is asked meanwhile. False if the run is to end.

        Args:
            ready: whether the wait is over, after so many seconds of it.
            over: whether nothing that this could wait for will come any more.
        """
        since = time.monotonic()
        try:
            while not ready(time.monotonic() - since):
                pulse.enter("waiting for text")  # each time, for a stream may be quiet for hours
                self.end_if(over())
                if (asks := self._asked()) is not None:
                    self.paused(asks)
                    if asks.stop:
                        return False
                self.rest(POLL_S)
                self._tell(POLL_S)
        finally:
            self.waited_s += time.monotonic() - since
        self._quiet = 0.0
        return True

    def stand(self, seconds: float) -> None:
        """Waits for so long. What is asked is heard elsewhere."""
        pulse.enter("waiting for text")
        self.rest(seconds)
        self.waited_s += seconds
        self._tell(seconds)

    def end_if(self, over: bool) -> None:
        """Asks all ranks to stop and to save, once, if nothing more comes."""
        if over and not self._ended:
            self._ended = self.asks.stop = self.asks.save = True

    def came(self) -> None:
        """A round has come."""
        self._quiet = 0.0

    def _asked(self) -> Asks | None:
        """What all ranks are asked before the next round, or None."""
        own = self.asks.take()
        if self.rank:
            self.pauses.ask(own)
            return self.pauses.heard()
        others = self.pauses.asked(self.size)
        found = Asks(own.stop or others.stop, own.save or others.save)
        if not (found.stop or found.save):
            return None
        self.pauses.announce(found)
        return found

    def _tell(self, seconds: float) -> None:
        before, self._quiet = self._quiet, self._quiet + seconds
        if self.rank == 0 and before < TELL_S <= self._quiet:
            self.say(f"waiting for text: nothing has arrived for {TELL_S:.0f} s, training goes on when it does")
