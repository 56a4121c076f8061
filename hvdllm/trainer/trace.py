"""A trace of what each rank did in some steps of a run, as a file for chrome://tracing or ui.perfetto.dev.

Each rank is a process in the trace, with one lane each for compute, flight and blocked time.
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
ROUNDS = 8  # collective sums by which the hosts' clocks are compared


class Trace:
    """Collects this rank's intervals, and writes those of all ranks.

    Args:
        steps: the first step to trace and the one to stop before, or None for no trace. All ranks pass the same.
        world: the ranks.
        device: that this rank computes on.
    """

    def __init__(self, steps: tuple[int, int] | None, world: World, device: torch.device) -> None:
        self.first, self.stop = steps or (0, 0)
        self.world, self.device = world, device
        self._noted: list[tuple[int, int, Mark | float, Mark | float]] = []  # step, lane, begin, end
        self._base: Mark | None = None  # the mark from which other marks are measured
        self._base_s = 0.0  # its time on the host's clock

    def wants(self, step: int) -> bool:
        """Whether the intervals of this step are kept."""
        return self.first <= step < self.stop

    def note(self, step: int, lane: str, begin: Mark | float, end: Mark | float) -> None:
        """Notes an interval.

        Args:
            step: in which it lies; those of other steps are dropped.
            lane: one of LANES.
            begin: a mark on the device, or seconds of device.now.
            end: likewise.
        """
        if not self.wants(step):
            return
        if self._base is None:
            # The base is set late, since the difference of two CUDA events is an fp32 in milliseconds.
            self._base = Mark(self.device)
            if self.device.type == "cuda" and not simulated():
                torch.cuda.synchronize(self.device)
                self._base_s = now()
            else:
                self._base_s = self._base.time
        self._noted.append((step, LANES.index(lane), begin, end))

    def write(self, path: Path) -> int:
        """Writes the intervals of all ranks to one file, on rank 0. Collective, unless there is no trace.

        Args:
            path: of the file; that of rank 0 counts.

        Returns the number of intervals.

        Raises RunError on rank 0 if the disk refuses the file.
        """
        if self.first == self.stop:
            return 0
        clock = [self._meet() for _ in range(ROUNDS)]
        own = [(step, lane, self._seconds(begin), self._seconds(end)) for step, lane, begin, end in self._noted]
        texts = self.world.texts(json.dumps({"clock": clock, "noted": own}), "act.trace")
        ranks = [json.loads(text) for text in texts]
        noted = sum(len(rank["noted"]) for rank in ranks)
        if self.world.rank == 0 and noted:  # a run that is resumed after these steps keeps its file
            try:
                write_whole(path, json.dumps({"traceEvents": _events(ranks)}))
            except OSError as error:
                raise RunError(f"cannot write the trace to {path} ({error}): free some space") from None
        return noted

    def _meet(self) -> tuple[float, float]:
        """The times at which this rank entered a collective sum and left it."""
        entered = now()
        self.world.sum(torch.zeros(1), "act.trace.clock").land()
        return entered, now()

    def _seconds(self, point: Mark | float) -> float:
        """A point in time in seconds on this host's clock."""
        if isinstance(point, Mark):
            assert self._base is not None
            return self._base_s + self._base.until(point)
        return point


def ahead(clock: list[tuple[float, float]], reference: list[tuple[float, float]]) -> float:
    """How many seconds a rank's clock is ahead of the reference clock.

    No rank leaves a sum before all ranks have entered it, so each sum bounds the difference from both sides. The result
    is the middle of the interval that all sums allow. Its error is at most half of that interval, which is about the
    time that the fastest sum took.

    Args:
        clock: when the rank entered and left each sum, by its own clock.
        reference: when the other rank entered and left the same sums, by the reference clock.
    """
    pairs = list(zip(clock, reference, strict=True))
    least = max(entered - left for (entered, _), (_, left) in pairs)
    most = min(left - entered for (_, left), (entered, _) in pairs)
    return (least + most) / 2


def _events(ranks: list[Json]) -> list[Json]:
    """The events in the Trace Event Format, with times in microseconds since the first interval, on rank 0's clock."""
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
