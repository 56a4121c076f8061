"""Logical ranks in one process: exact collectives, one order whatever the machine does, and mistakes said at once."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hvdllm.errors import PeerError, UserError
from hvdllm.world.base import Asks
from hvdllm.world.virtual import VirtualWorld, run

SIZES = [1, 2, 3, 8]


def draw(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(100 + rank)).to(dtype)


def in_order(parts: list[torch.Tensor]) -> torch.Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total = total + part
    return total


# ------------------------------------------------------------------ collectives against plain torch
@pytest.mark.parametrize("n", SIZES)
def test_sum_and_broadcast_are_in_place(n: int) -> None:
    def body(world: VirtualWorld) -> list[torch.Tensor]:
        x, y = draw(world.rank, 5), draw(world.rank, 5)
        assert world.sum(x, "a").land() is x and world.broadcast(y, "b", n - 1).land() is y
        return [x, y]

    for x, y in run(n, body):
        assert x.equal(in_order([draw(rank, 5) for rank in range(n)])) and y.equal(draw(n - 1, 5))


@pytest.mark.parametrize("n", SIZES)
def test_scatter_gather_and_alltoall(n: int) -> None:
    def body(world: VirtualWorld) -> list[torch.Tensor]:
        x = draw(world.rank, 2 * n, 3)
        out = [world.alltoall(x, "a").land(), world.gather(x[: world.rank], "b").land()]
        return [*out, world.scatter(x, "c").land()]

    given = [draw(rank, 2 * n, 3) for rank in range(n)]
    for rank, (swapped, gathered, share) in enumerate(run(n, body)):
        mine = slice(2 * rank, 2 * rank + 2)
        assert swapped.equal(torch.cat([x[mine] for x in given]))
        assert gathered.equal(torch.cat([x[:r] for r, x in enumerate(given)]))
        assert share.equal(in_order(given)[mine])


def test_halves_are_added_in_fp32_and_rounded_once() -> None:
    def body(world: VirtualWorld) -> list[float]:
        x = torch.full((4,), [256.0, 1.0, 1.0, 0.0][world.rank], dtype=torch.bfloat16)
        return [world.sum(x.clone(), "a").land()[0].item(), world.scatter(x, "b").land()[0].item()]

    assert run(4, body) == [[258.0, 258.0]] * 4, "one after the other in bf16 it is 256"


def test_adasum_is_a_tree_of_pairs() -> None:
    def pair(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (1 - a @ b / (2 * a @ a)) * a + (1 - a @ b / (2 * b @ b)) * b

    g = [draw(rank, 6, dtype=torch.float64) for rank in range(4)]
    out = run(4, lambda world: world.adasum(g[world.rank].clone().reshape(2, 3), "a").land())
    for x in out:
        torch.testing.assert_close(x.flatten(), pair(pair(g[0], g[1]), pair(g[2], g[3])), rtol=1e-14, atol=0)
    zero, some = torch.zeros(3), torch.arange(3.0)
    assert run(2, lambda world: world.adasum([zero, some][world.rank].clone(), "a").land())[0].equal(some)
    with pytest.raises(UserError, match="there are 3"):
        run(3, lambda world: world.adasum(torch.ones(1), "a"))


def test_texts_and_agreement() -> None:
    assert run(3, lambda world: world.texts("é" * world.rank, "a")) == [["", "é", "éé"]] * 3
    with pytest.raises(UserError, match="on rank 2: no GPU"):
        run(3, lambda world: world.agree("no GPU" if world.rank == 2 else None, "a"))


# ------------------------------------------------------------------ order and chance
def test_runs_are_bit_equal_whatever_the_machine_does() -> None:
    def once(jitter: random.Random) -> tuple[list[torch.Tensor], list[int]]:
        order: list[int] = []

        def body(world: VirtualWorld) -> torch.Tensor:
            x, flights = torch.randn(8), []
            for step in range(6):
                time.sleep(jitter.random() / 300)
                order.append(world.rank)
                work = x * torch.rand(8)
                flights.append(world.drive(lambda work=work, step=step: world.sum(work, f"a.{step % 2}").land()))
                if step % 2:
                    time.sleep(jitter.random() / 300)
                    while not flights[0].landed():
                        order.append(world.rank)
                    x = x + flights.pop(0).land() + torch.randn(8)
            return x + sum(flight.land() for flight in flights)

        torch.manual_seed(1)
        return run(4, body), order

    (first, order), (again, order2) = once(random.Random(1)), once(random.Random(2))
    assert order == order2 and all(a.equal(b) for a, b in zip(first, again, strict=True))


def test_each_rank_draws_as_if_alone_and_the_caller_too() -> None:
    def body(world: VirtualWorld) -> list[float]:
        out = []
        for _ in range(3):
            out.append(torch.rand(1).item())
            world.sum(torch.ones(1), "a").land()
        return out

    torch.manual_seed(3)
    alone = torch.rand(3).tolist()
    torch.manual_seed(3)
    assert run(4, body) == [alone] * 4
    assert torch.rand(3).tolist() == alone, "the ranks' draws are not the caller's"

    def fails(world: VirtualWorld) -> None:
        torch.rand(5)
        if world.rank == 1:
            raise ValueError
        world.sum(torch.ones(1), "a").land()

    torch.manual_seed(3)
    with pytest.raises(ValueError):
        run(3, fails)
    assert torch.rand(3).tolist() == alone


def test_who_polls_lets_others_run() -> None:
    def body(world: VirtualWorld) -> int:
        if world.rank:
            return world.sum(torch.ones(1), "a").land().item()
        flight, polls = world.sum(torch.ones(1), "a"), 0
        while not flight.landed():
            polls += 1
        return flight.land().item()

    assert run(3, body) == [3, 3, 3]


# ------------------------------------------------------------------ the driver
def test_driven_work_is_done_in_order_and_behind_its_caller() -> None:
    log: list[str] = []

    def body(world: VirtualWorld) -> list[Any]:
        def work(name: str) -> str:
            mine = world.rank == 0
            log.extend([f"begin {name}"] * mine)
            world.sum(torch.ones(1), f"driven.{name}").land()
            log.extend([f"end {name}"] * mine)
            return name

        flights = [world.drive(lambda name=name: work(name)) for name in "abc"]
        log.extend(["driven"] * (world.rank == 0))
        return [flight.land() for flight in reversed(flights)]

    assert run(3, body) == [["c", "b", "a"]] * 3
    assert log == ["driven", "begin a", "end a", "begin b", "end b", "begin c", "end c"]


def test_what_was_driven_is_done_though_nobody_lands_it() -> None:
    done: list[int] = []
    run(2, lambda world: world.drive(lambda: done.append(world.rank)) and None)
    assert sorted(done) == [0, 1]


def test_an_error_in_driven_work_is_raised_where_it_lands() -> None:
    def body(world: VirtualWorld) -> str:
        def work() -> None:
            raise KeyError("here")

        flight = world.drive(work)
        world.sum(torch.ones(1), "a").land()
        try:
            flight.land()
        except KeyError as error:
            return str(error)
        return "nothing"

    assert run(2, body) == ["'here'"] * 2


# ------------------------------------------------------------------ parts, hosts, bytes
def test_parts_know_their_ranks_their_host_and_count_into_the_whole() -> None:
    def body(world: VirtualWorld) -> list[Any]:
        hosts = (world.local_rank, world.local_size)
        out: list[Any] = [hosts]
        for name, groups in (("near", [(0, 1), (2, 3), (4, 5)]), ("cross", [(4, 2, 0), (5, 3, 1)])):
            part = world.split(groups, f"split.{name}")
            before = world.bytes_sent
            x = torch.full((6,), float(world.rank))
            part.sum(x, "same.name").land()
            assert world.bytes_sent - before == pytest.approx(2 * (part.size - 1) / part.size * 24) == part.bytes_sent
            assert part.asks is world.asks
            part.broadcast(y := torch.tensor([float(world.rank)]), "root", 1).land()
            driven = part.drive(lambda part=part: part.rank).land()
            place = (part.rank, part.size, part.local_rank, part.local_size)
            out.append((*place, x[0].item(), y.item(), driven))
        return out

    out = run(6, body, hosts=3)
    for rank, (hosts, near, cross) in enumerate(out):
        node, me = divmod(rank, 2)
        assert hosts == (me, 2)
        assert near == (me, 2, me, 2, 4.0 * node + 1, 2.0 * node + 1, me)
        assert cross == (node, 3, 0, 1, 6.0 + 3 * me, 2.0 + me, node)


def test_a_part_as_large_as_the_whole_is_still_another_world() -> None:
    def body(world: VirtualWorld) -> list[float]:
        part = world.split([(0, 1)], "split")
        flights = [where.sum(torch.ones(1), "a") for where in ((world, part) if world.rank else (part, world))]
        return [flight.land().item() for flight in flights]

    assert run(2, body) == [[2.0, 2.0]] * 2


@pytest.mark.parametrize("groups", [[(0,)], [(0, 1), (1, 2)], [(0, 1, 2), (3,)]])
def test_groups_that_are_none(groups: list[tuple[int, ...]]) -> None:
    with pytest.raises(RuntimeError, match="disjoint groups of 3 ranks"):
        run(3, lambda world: world.split(groups, "a"))


def test_hosts_divide_the_size() -> None:
    with pytest.raises(UserError, match="multiple"):
        run(6, lambda world: None, hosts=4)


@pytest.mark.parametrize(
    ("launch", "sent"),
    [
        (lambda world, x: world.sum(x, "a"), [2 * 4 / 5 * 40] * 5),
        (lambda world, x: world.scatter(x, "a"), [4 / 5 * 40] * 5),
        (lambda world, x: world.alltoall(x, "a"), [4 / 5 * 40] * 5),
        (lambda world, x: world.gather(x, "a"), [4 * 40] * 5),
        # Gloo's tree from rank 1: 1 -> 2; 1 -> 3, 2 -> 4; 1 -> 0
        (lambda world, x: world.broadcast(x, "a", 1), [0, 3 * 40, 40, 0, 0]),
    ],
)
def test_bytes(launch: Callable[[VirtualWorld, torch.Tensor], Any], sent: list[float]) -> None:
    def body(world: VirtualWorld) -> float:
        launch(world, torch.ones(10)).land()
        return world.bytes_sent

    assert run(5, body) == pytest.approx(sent)


# ------------------------------------------------------------------ mistakes
def both(world: VirtualWorld) -> Any:
    world.sum(torch.ones(1), "a")
    return world.sum(torch.ones(1), "a").land()


def dropped(world: VirtualWorld) -> Any:
    """All have joined, but nobody has looked: over Horovod it may still be under way."""
    world.sum(torch.ones(1), "a")
    world.texts("", "b")
    world.sum(torch.ones(1), "a")


def kinds(world: VirtualWorld) -> Any:
    return (world.sum if world.rank else world.gather)(torch.ones(1), "a").land()


def shapes(world: VirtualWorld) -> Any:
    return world.sum(torch.ones(1 + world.rank), "a").land()


def dtypes(world: VirtualWorld) -> Any:
    return world.sum(torch.ones(1, dtype=[torch.float32, torch.float64][world.rank]), "a").land()


def roots(world: VirtualWorld) -> Any:
    return world.broadcast(torch.ones(1), "a", world.rank).land()


def touched(world: VirtualWorld) -> Any:
    x = torch.ones(2)
    flight = world.sum(x, "a")
    x[1] += world.rank
    return flight.land()


def odd(world: VirtualWorld) -> Any:
    return world.scatter(torch.ones(3), "a").land()


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (both, "rank 0 launches sum `a` before it has seen its last use land"),
        (dropped, "rank . launches sum `a` before"),
        (kinds, "`a` is .*sum.* on rank 1 and .*gather.* on rank 0"),
        (shapes, "`a` is .* on rank 1 and .* on rank 0"),
        (dtypes, "float64.* on rank 1 and .*float32.* on rank 0"),
        (roots, "`a` is .* on rank 1 and .* on rank 0"),
        (touched, "rank 1 wrote to the tensor of `a` while it was in flight"),
        (odd, "3 rows are not dealt to 2 ranks"),
    ],
)
def test_mistakes_are_said(body: Callable[[VirtualWorld], Any], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        run(2, body)


def test_a_name_is_free_again_once_it_was_seen_to_land() -> None:
    def body(world: VirtualWorld) -> float:
        flight = world.sum(torch.ones(1), "a")
        while not flight.landed():
            pass
        return world.sum(torch.ones(1), "a").land().item()

    assert run(2, body) == [2.0, 2.0]


def test_a_deadlock_is_said_with_its_names() -> None:
    def body(world: VirtualWorld) -> None:
        if world.rank < 2:
            world.sum(torch.ones(1), "first" if world.rank else "second").land()

    with pytest.raises(
        RuntimeError,
        match="rank 0 waits for `second` without ranks 1, 2; rank 1 waits for `first` without ranks 0, 2",
    ):
        run(3, body)


def test_a_driver_that_waits_for_what_is_driven_later_is_a_deadlock() -> None:
    def body(world: VirtualWorld) -> None:
        later: list[Any] = []
        flight = world.drive(lambda: later[0].land())
        later.append(world.drive(lambda: None))
        flight.land()

    with pytest.raises(RuntimeError, match=r"rank 0 \(driver\) waits for driven work"):
        run(1, body)


@pytest.mark.parametrize("where", ["before", "between", "driven"])
def test_the_failing_rank_is_heard_and_the_others_end(where: str) -> None:
    ended: list[int] = []

    def body(world: VirtualWorld) -> None:
        def fail() -> None:
            raise ValueError(f"rank {world.rank} fails")

        try:
            if world.rank == 2 and where == "before":
                fail()
            world.sum(torch.ones(1), "a").land()
            driven = world.drive(lambda: world.sum(torch.ones(1), "b").land())
            if world.rank == 2:
                world.drive(fail).land() if where == "driven" else fail()
            driven.land()
            world.sum(torch.ones(1), "c").land()
        except PeerError:
            ended.append(world.rank)
            raise

    with pytest.raises(ValueError, match="rank 2 fails"):
        run(4, body)
    assert sorted(ended) == ([0, 1] if where == "before" else [0, 1, 3]), "one that had not begun does not begin"


def test_ctrl_c_in_the_calling_thread_ends_the_ranks() -> None:
    """Signals are heard by the main thread alone, which does not run a rank."""
    ends: list[int] = []

    def body(world: VirtualWorld) -> None:
        try:
            world.texts("", "all have begun")
            if world.rank == 0:
                os.kill(os.getpid(), signal.SIGINT)
            while True:
                time.sleep(0.001)
                world.sum(torch.ones(1), "a").land()
        finally:
            ends.append(world.rank)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(3, body)
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(ends) == [0, 1, 2]


def test_asks_are_rank_0s() -> None:
    asks = Asks(stop=True)
    assert run(2, lambda world: world.asks.stop, asks) == [True, False]
