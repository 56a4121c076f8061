"""Launching buckets of gradients from hooks, while the backward of the last micro-batch still runs.

The order is fixed: decayed buckets from the last to the first, then the undecayed one, which spans all layers
and fills last. A bucket that is full waits for those before it, so that every rank launches in the same order
whatever its graph; what no hook launched (an empty batch), `launch_rest` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvdllm.world.base import Flight


class Buckets:
    """flat: the one map. launch: called with a bucket, enqueues and returns the flight."""

    def __init__(self, flat: Any, launch: Callable[[Any], Flight]) -> None:
        self._launch = launch
        self._order = sorted(flat.buckets, key=lambda bucket: (not bucket.span.decayed, -bucket.index))
        self._armed = False
        self._flights: list[Flight] = []
        self._missing = {bucket.index: 0 for bucket in self._order}

    def hook(self, flat: Any) -> list[Any]:
        """Registers a hook on every parameter; it only counts and enqueues. Returns the handles."""

        def count(index: int) -> Callable[[nn.Parameter], None]:
            def full(_: torch.Tensor) -> None:
                if self._armed:
                    self._missing[index] -= 1
                    self._launch_full()

            return full

        return [
            flat.parameters[name].register_post_accumulate_grad_hook(count(bucket.index))
            for bucket in self._order
            for name in bucket.names
        ]

    def arm(self, on: bool) -> None:
        """Before a forward: shall the hooks of its backward launch? Only those of a round's last micro-batch."""
        self._armed = on
        if on:
            self._missing = {bucket.index: len(bucket.names) for bucket in self._order}

    def _launch_full(self) -> None:
        while len(self._flights) < len(self._order):
            bucket = self._order[len(self._flights)]
            if self._missing[bucket.index]:
                return
            self._flights.append(self._launch(bucket))

    def launch_rest(self) -> list[Flight]:
        """Launches what is left, in the fixed order. All flights of the round, by bucket."""
        self._armed = False
        for bucket in self._order[len(self._flights) :]:
            self._flights.append(self._launch(bucket))
        flights, self._flights = self._flights, []
        by_bucket = {bucket.index: flight for bucket, flight in zip(self._order, flights, strict=True)}
        return [by_bucket[index] for index in sorted(by_bucket)]
