"""What each rank did when, in some steps of a run, as a file for chrome://tracing or ui.perfetto.dev.

A process a rank, and in it a lane each for compute, flight and blocked. Nothing is kept of steps outside.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from hvdllm.device import Mark, now, simulated
from hvdllm.errors import RunError
from hvdllm.plain import Json
from hvdllm.runs import write_whole
from hvdllm.world.base import World

LANES = ("compute", "flight", "blocked")
ROUNDS = 8  # sums that clocks are compared by


class Trace:
    """steps: the first and the one to stop before, or None: no trace. All ranks pass the same."""

    def __init__(self, steps: tuple[int, int] | None, world: World, device: torch.device) -> None:
        self.first, self.stop = steps or (0, 0)
        self.world, self.device = world, device
        self._noted: list[tuple[int, int, Mark | float, Mark | float]] = []  # step, lane, begin, end
        self._base: Mark | None = None  # marks are told from this one,
        self._base_s = 0.0  # which stands here on the host's clock

    def wants(self, step: int) -> bool:
        """Would an interval of this step be kept?"""
        return self.first <= step < self.stop

    def note(self, step: int, lane: str, begin: Mark | float, end: Mark | float) -> None:
        """An interval of one of LANES; begin and end are marks, or seconds of device.now."""
        if not self.wants(step):
            return
        if self._base is None:
            # Now, not at the start of the run: the difference of two CUDA events is an fp32 of milliseconds.
            self._base = Mark(self.device)
            if self.device.type == "cuda" and not simulated():
                torch.cuda.synchronize(self.device)
                self._base_s = now()
            else:
                self._base_s = self._base.time
        self._noted.append((step, LANES.index(lane), begin, end))

    def write(self, path: Path) -> int:
        """Rank 0 writes all ranks' intervals; returns how many. Collective, except where there is no trace.

        path: rank 0's counts. Raises RunError on rank 0 where the disk does not take the file.
        """
        if self.first == self.stop:
            return 0
        clock = [self._meet() for _ in range(ROUNDS)]
        own = [(step, lane, self._seconds(begin), self._seconds(end)) for step, lane, begin, end in self._noted]
        texts = self.world.texts(json.dumps({"clock": clock, "noted": own}), "act.trace")
        ranks = [json.loads(text) for text in texts]
        noted = sum(len(rank["noted"]) for rank in ranks)
        if self.world.rank == 0 and noted:  # a run resumed behind these steps keeps the file it has
            try:
                write_whole(path, json.dumps({"traceEvents": _events(ranks)}))
            except OSError as error:
                raise RunError(f"cannot write the trace to {path} ({error}): free some space") from None
        return noted

    def _meet(self) -> tuple[float, float]:
        """When this rank entered a sum and when it left it."""
        entered = now()
        self.world.sum(torch.zeros(1), "act.trace.clock").land()
        return entered, now()

    def _seconds(self, point: Mark | float) -> float:
        """On this host's clock."""
        if isinstance(point, Mark):
            assert self._base is not None
            return self._base_s + self._base.until(point)
        return point


def ahead(clock: list[tuple[float, float]], reference: list[tuple[float, float]]) -> float:
    """How many seconds a rank's clock is ahead of another's, from when each entered and left the same sums.

    Nobody leaves a sum that somebody has not entered: each sum bounds the difference from both sides. The middle of
    what all of them leave; it is wrong by half of that at most, about the time that the fastest sum took.
    """
    pairs = list(zip(clock, reference, strict=True))
    least = max(entered - left for (entered, _), (_, left) in pairs)
    most = min(left - entered for (_, left), (entered, _) in pairs)
    return (least + most) / 2


def _events(ranks: list[Json]) -> list[Json]:
    """Of the Trace Event Format: times in microseconds from the first interval, on rank 0's clock."""
    names: list[Json] = []
    events: list[Json] = []
    for rank, said in enumerate(ranks):
        names.append({"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}})
        names.append({"ph": "M", "pid": rank, "name": "process_sort_index", "args": {"sort_index": rank}})
        for lane, name in enumerate(LANES):
            names.append({"ph": "M", "pid": rank, "tid": lane, "name": "thread_name", "args": {"name": name}})
            names.append(
                {"ph": "M", "pid": rank, "tid": lane, "name": "thread_sort_index", "args": {"sort_index": lane}}
            )
        offset = ahead(said["clock"], ranks[0]["clock"])
        for step, lane, begin, end in said["noted"]:
            event = {"ph": "X", "pid": rank, "tid": lane, "name": LANES[lane], "cat": "exchange"}
            events.append(event | {"ts": begin - offset, "dur": (end - begin) * 1e6, "args": {"step": step}})
    origin = min((event["ts"] for event in events), default=0.0)
    for event in events:
        event["ts"] = (event["ts"] - origin) * 1e6
    return [*names, *sorted(events, key=lambda event: event["ts"])]
