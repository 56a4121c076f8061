"""The simulated clock of logical ranks: what happens, happens in the order of its times, and again the same way."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from hvdllm import device
from hvdllm.world.hub import POLL_S, Links
from hvdllm.world.virtual import VirtualWorld, run

MB = 250_000  # fp32 elements of one


def ones(bytes_: int = 4) -> torch.Tensor:
    return torch.ones(bytes_ // 4)


def test_threads_tell_simulated_time_and_the_caller_does_not() -> None:
    def body(world: VirtualWorld) -> list[float]:
        seen = [device.now()]
        world.spend(2.5)
        mark = device.Mark(torch.device("cpu"))
        world.spend(1.5)
        driven = world.drive(device.now).land()
        seen += [mark.time, mark.until(device.Mark(torch.device("cpu"))), device.now(), driven]
        return [*seen, float(device.simulated())]

    begin = time.perf_counter()
    assert run(2, body, links=Links()) == [[0, 2.5, 1.5, 4.0, 4.0, 1.0]] * 2
    assert not device.simulated() and begin < device.now() < begin + 60
    assert run(1, lambda world: device.simulated()) == [False], "without links time is the host's"


def test_a_collective_lands_when_the_last_has_joined_and_its_bytes_have_passed() -> None:
    """Caught: an arrival at the first joiner's time, bytes of the fastest rank, latency per byte."""

    def body(world: VirtualWorld) -> list[float]:
        out = []
        world.spend(world.rank)  # the last joins at 2
        world.sum(torch.ones(MB), "sum").land()  # 2 x 2/3 MB a rank, 1 MB a second
        out.append(device.now())
        world.scatter(torch.ones(MB - MB % 3), "scatter").land()
        out.append(device.now())
        world.gather(torch.ones(MB if world.rank == 1 else 1), "gather").land()  # the longest decides
        out.append(device.now())
        world.broadcast(torch.ones(MB), "broadcast").land()  # from rank 0 to both
        return [*out, device.now()]

    at = [2 + 4 / 3 + 0.25]
    for more in (2 / 3, 2.0, 2.0):
        at.append(at[-1] + more + 0.25)
    for seen in run(3, body, links=Links(1e6, 0.25)):
        assert seen == pytest.approx(at, abs=1e-5)


def test_a_link_carries_one_thing_after_another() -> None:
    """Caught: collectives that each have the whole link at once."""

    def body(world: VirtualWorld) -> list[float]:
        flights = [world.sum(torch.ones(MB), f"grad.{k}") for k in range(4)]  # 1 MB a rank each
        times = []
        for flight in flights:
            flight.land()
            times.append(device.now())
        return times

    assert run(2, body, links=Links(1e6, 0.5)) == [pytest.approx([1.5, 2.5, 3.5, 4.5])] * 2


def test_parts_book_the_links_of_their_ranks_and_a_host_none() -> None:
    def body(world: VirtualWorld) -> list[float]:
        near, cross = world.split([(0, 1), (2, 3)], "near"), world.split([(2, 0), (1, 3)], "cross")
        begin, times = device.now(), []
        for part in (near, cross, cross):
            part.sum(torch.ones(MB), "a").land()
            times.append(device.now() - begin)
        return times

    assert run(4, body, hosts=2, links=Links(1e6)) == [pytest.approx([0, 1, 2])] * 4
    assert run(4, body, links=Links(1e6)) == [pytest.approx([1, 2, 3])] * 4, "one host: each rank has a link"


def test_a_poll_says_yes_from_the_arrival_on_and_not_before() -> None:
    """Caught: a poll that asks only whether all have joined."""

    def body(world: VirtualWorld) -> list[Any]:
        if world.rank:
            world.spend(1.0)
        flight = world.sum(ones(), "a")  # lands at 1 + latency
        seen = []
        while not flight.landed():
            seen.append(device.now())
            world.spend(0.4)
        return [len(seen), device.now()]

    (polls, first), (later, second) = run(2, body, links=Links(latency_s=0.5))
    assert (polls, later) == (4, 2) and first == pytest.approx(1.6, abs=1e-3) and second == pytest.approx(1.8, abs=1e-3)


def test_polling_without_end_lets_time_pass() -> None:
    def body(world: VirtualWorld) -> float:
        world.spend(0.01 * world.rank)
        flight = world.sum(ones(), "a")
        while not flight.landed():
            pass
        return device.now()

    for at in run(2, body, links=Links()):
        assert 0.01 <= at <= 0.01 + 2 * POLL_S


def test_what_happens_does_so_in_the_order_of_its_times() -> None:
    """Causality: notes are made by all ranks and drivers in one list. Caught: `spend` that does not pass the baton."""
    notes: list[float] = []

    def body(world: VirtualWorld) -> None:
        def note() -> None:
            notes.append(device.now())

        def work() -> None:
            note()
            world.sum(torch.ones(1000), "driven").land()
            note()

        for step in range(5):
            world.spend(0.1 + 0.07 * ((world.rank + step) % 4))
            note()
            driven = world.drive(work)
            world.spend(0.05 * world.rank)
            note()
            while not driven.landed():
                note()
                world.spend(0.03)
            driven.land()
            note()
            world.sum(ones(), "met").land()
            note()

    run(4, body, links=Links(20_000.0, 0.01))
    assert len(notes) > 150 and notes == sorted(notes)


def test_a_wait_for_what_somebody_else_makes_ends_no_earlier_than_it_was_made() -> None:
    """As letters and drivers wait: no arrival is given, so it is the moment itself. Caught: its own time."""
    made: list[float] = []

    def body(world: VirtualWorld) -> float:
        if world.rank == 0:
            world.hub.wait(lambda: bool(made), lambda: "something")
            return device.now()
        world.spend(3.0)
        made.append(device.now())
        world.spend(1.0)
        return device.now()

    assert run(2, body, links=Links()) == [3.0, 4.0]


def test_a_letter_books_the_senders_way_up_and_the_receivers_way_down() -> None:
    def body(world: VirtualWorld) -> list[float]:
        hub = world.hub
        if world.rank == 0:
            return [hub.carry([0], [2], 1e6), hub.carry([0], [1], 1e6), hub.carry([0], [0], 1e6)]
        world.spend(1e-3)
        return [hub.carry([1], [2], 1e6)] if world.rank == 1 else [hub.carry([2], [0], 1e6)]

    zero, one, two = run(3, body, links=Links(1e6, 0.5))
    assert zero == [1.5, 2.5, 0.0], "its second waits for its own link; what stays at home takes no time"
    assert one == [2.5], "the way to rank 2 is taken for a second"
    assert two == [1.501], "the ways back are free"


def test_without_a_clock_nothing_has_a_time() -> None:
    def body(world: VirtualWorld) -> list[float]:
        world.sum(torch.ones(MB), "a").land()
        world.drive(lambda: None).land()
        return [world.hub.now(), world.hub.carry([0], [1], 1e9), world.hub.lanes[0].time]

    assert run(2, body) == [[0.0, 0.0, 0.0]] * 2
