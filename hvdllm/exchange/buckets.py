"""Launches buckets of gradients from hooks, while the backward of the last micro-batch still runs.

The order is fixed: decayed buckets from the last to the first, then the undecayed one, which spans all layers and is
full last. A full bucket waits for those before it in this order, so that every rank launches in the same order,
whatever its graph. What no hook has launched, `launch_rest` launches: after an empty batch these are all buckets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hvdllm.flat import Bucket, Flat
from hvdllm.world.base import Flight


def after_gradient(p: nn.Parameter, hook: Callable[[nn.Parameter], None]) -> RemovableHandle:
    """From here on `hook` is called whenever a backward has added to the gradient of p."""
    register: Callable[[Callable[[nn.Parameter], None]], RemovableHandle] = p.register_post_accumulate_grad_hook
    return register(hook)


class Buckets:
    """launch: is called with a bucket, enqueues its sum and returns the flight."""

    def __init__(self, flat: Flat, launch: Callable[[Bucket], Flight]) -> None:
        self._launch = launch
        self._order = sorted(flat.buckets, key=lambda bucket: (not bucket.span.decayed, -bucket.index))
        self._armed = False
        self._flights: list[Flight] = []
        self._missing = {bucket.index: 0 for bucket in self._order}

    def hook(self, flat: Flat) -> list[RemovableHandle]:
        """Registers a hook on every parameter; it only counts and enqueues. Returns the handles."""

        def count(index: int) -> Callable[[nn.Parameter], None]:
            def full(_: torch.Tensor) -> None:
                if self._armed:
                    self._missing[index] -= 1
                    self._launch_full()

            return full

        return [
            after_gradient(flat.parameters[name], count(bucket.index))
            for bucket in self._order
            for name in bucket.names
        ]

    def arm(self, on: bool) -> None:
        """Before a forward. on: the hooks of its backward launch, as for the last micro-batch of a round."""
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
        """Launches what is left, in the fixed order. Returns all flights of the round, in the order of the buckets."""
        self._armed = False
        for bucket in self._order[len(self._flights) :]:
            self._flights.append(self._launch(bucket))
        flights, self._flights = self._flights, []
        by_bucket = {bucket.index: flight for bucket, flight in zip(self._order, flights, strict=True)}
        return [by_bucket[index] for index in sorted(by_bucket)]
