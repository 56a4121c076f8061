"""One order of launches on every rank, whatever the speed of its threads."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from hvdllm.world.driver import Driver
from hvdllm.world.launches import Launches
from hvdllm.world.torch import TorchRanks

CPU = torch.device("cpu")


class Rank:
    """drive() of a TorchRanks, and launches that take a random time."""

    drive = TorchRanks.drive

    def __init__(self, seed: int) -> None:
        self.launches, self._driver, self.parent = Launches(), Driver(), None
        self.order: list[str] = []
        self.random = random.Random(seed)

    def sleep(self) -> None:
        time.sleep(self.random.random() * 3e-3)

    def launch(self, name: str) -> Future[Any]:
        self.sleep()
        return self.launches.launch(lambda: self.order.append(name), CPU)

    def close(self) -> None:
        self._driver.close()
        self.launches.close()


def acco(rank: Any) -> None:
    """Buckets of one half are launched by hooks while the driver walks the half before."""
    before = None
    for half in range(6):
        flights = [rank.launch(f"grad.{half}.{bucket}") for bucket in range(3)]

        def travel(half: int = half, flights: list[Future[Any]] = flights) -> None:
            for flight in flights:
                flight.result()
            rank.sleep()
            rank.launch(f"total.{half}").result()
            rank.drive(lambda: rank.launch(f"param.{half}").result()).land()  # a stage of its own, walked at once

        driven = rank.drive(travel)
        if before is not None:
            before.land()
        before = driven
    assert before is not None
    before.land()
    rank.launch("audit").result()


def test_the_order_is_that_of_the_program_on_every_rank() -> None:
    ranks = [Rank(seed) for seed in range(4)]
    threads = [threading.Thread(target=acco, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a launch waits for ever"
    each = ("grad.{}.0", "grad.{}.1", "grad.{}.2", "total.{}", "param.{}")
    assert all(rank.order == [*(name.format(half) for half in range(6) for name in each), "audit"] for rank in ranks)
    for rank in ranks:
        rank.close()


def test_asking_waits_for_nothing() -> None:
    rank, go = Rank(0), threading.Event()
    driven = rank.drive(go.wait)
    behind = rank.launch("grad")  # returns, though the driven work before it has not ended
    assert not behind.done()
    go.set()
    driven.land()
    behind.result(timeout=60)
    rank.close()


def test_what_a_launch_raises_is_raised_where_it_lands_and_the_next_one_goes() -> None:
    launches = Launches()
    fail: Callable[[], Any] = lambda: 1 / 0  # noqa: E731
    bad, good = launches.launch(fail, CPU), launches.launch(lambda: 3, CPU)
    with pytest.raises(ZeroDivisionError):
        bad.result(timeout=60)
    assert good.result(timeout=60) == 3
    launches.close()


def test_work_that_fails_leaves_its_place() -> None:
    rank = Rank(0)

    def fail() -> None:
        rank.launch("first")
        raise ValueError("no")

    driven = rank.drive(fail)
    with pytest.raises(ValueError, match="no"):
        driven.land()
    rank.launch("second").result(timeout=60)
    assert not rank.launches._line or not rank.launches._line[0].open, "places are left"
    assert rank.order == ["first", "second"]
    rank.close()
