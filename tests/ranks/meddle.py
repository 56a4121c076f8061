"""What goes wrong, or in the way, at a place that a test names. Faults are [rank, step]: after that step's acts."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch

from hvdllm.checkpoint import write
from hvdllm.exchange.buckets import Buckets
from hvdllm.exchange.server_shard import ServedSlice
from hvdllm.trainer.acts import Acts
from hvdllm.trainer.backward import Loss


@contextmanager
def meddle(
    rank: int,
    stop: Any = None,  # asks for a stop, as a signal does
    kill: Any = None,  # SIGKILL
    fail: Any = None,  # raises
    hang: Any = None,  # sleeps for an hour
    bad: Any = None,  # [rank, round, parameter, ...]: their gradients there are NaN; None: the loss is
    large: Any = None,  # [rank, round, factor]: its loss there is multiplied
    jitter: bool = False,  # random sleeps in hooks and between micro-batches
    slow_s: float = 0.0,  # sleep after every step
    slow: Any = None,  # [rank, times]: this rank takes so many times as long for each micro-batch
    serve_fail: Any = None,  # [rank, version]: its server's thread raises when it is to make this one, or one after
    long_s: float = 0.0,  # that saves of rank 0, and the first micro-batch of rank 1, take longer
    chaos: Any = None,  # seed: heavy-tailed delays, and asks at random moments
) -> Iterator[None]:
    act, forward, launch_full, apply = Acts.act, Loss.forward, Buckets._launch_full, ServedSlice._apply
    draw = random.Random(os.urandom(8) if chaos is None else 1000 * chaos + rank)
    asks: list[Any] = []
    first = [long_s] if rank == 1 else []
    save = write.write

    def saving(*given: Any, **named: Any) -> Any:
        time.sleep(long_s if rank == 0 else 0.0)
        return save(*given, **named)

    def acting(self: Acts, commit: Any) -> None:
        act(self, commit)
        asks[:] = [self.run.world.asks]
        time.sleep(slow_s)

        def due(what: Any) -> bool:
            """At the first mark from that step on: a server's marks are some steps apart."""
            return bool(what) and rank == what[0] and commit.step - commit.updates < what[1] <= commit.step

        if due(stop):
            self.run.world.asks.stop = True
        if due(kill):
            os.kill(os.getpid(), signal.SIGKILL)
        if due(hang):
            time.sleep(3600)
        if due(fail):
            raise ValueError("an apple fell on the fan")

    def forwarding(self: Loss, inputs: torch.Tensor, targets: torch.Tensor, place: Any) -> torch.Tensor:
        if jitter:
            time.sleep(draw.expovariate(1000))
        if chaos is not None:
            time.sleep(min(0.3, 5e-4 * draw.paretovariate(0.8)))
            for one in asks:
                one.save |= draw.random() < 0.02
                one.stop |= draw.random() < 0.002
        time.sleep(first.pop() if first else 0.0)
        begin = time.perf_counter()
        loss = forward(self, inputs, targets, place)
        if slow is not None and rank == slow[0]:  # a backward takes about two forwards
            time.sleep(3 * (slow[1] - 1) * (time.perf_counter() - begin))
        if large is not None and [rank, place[0]] == large[:2]:
            loss = loss * large[2]
        if bad is None or [rank, place[0]] != bad[:2]:
            return loss
        if bad[2] is None:
            return loss * float("nan")
        # Through the graph and not by a hook on the parameter, so that only these are touched.
        parameters = dict(self.model.named_parameters())
        return loss + sum(Poison.apply(parameters[name]) for name in bad[2:])

    def launching(self: Buckets) -> None:
        if jitter:
            time.sleep(draw.expovariate(2000))
        launch_full(self)

    def applying(self: ServedSlice) -> None:
        if serve_fail is not None and rank == serve_fail[0] and self.version + 1 >= serve_fail[1]:
            raise ValueError("an apple fell on the server")
        apply(self)

    with ExitStack() as stack:
        for owner, name, double in ((Acts, "act", acting), (Loss, "forward", forwarding)):
            stack.enter_context(patch.object(owner, name, double))
        stack.enter_context(patch.object(Buckets, "_launch_full", launching))
        stack.enter_context(patch.object(write, "write", saving))
        stack.enter_context(patch.object(ServedSlice, "_apply", applying))
        yield


class Poison(torch.autograd.Function):
    """Adds 0 to the loss and NaN to one gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return torch.full_like(ctx.saved_tensors[0], float("nan"))
