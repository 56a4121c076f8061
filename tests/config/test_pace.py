"""What world= says of speed: who is slowed, how fast logical ranks are, and what is refused."""

from __future__ import annotations

import math
from statistics import fmean, pstdev
from typing import Any

import pytest

from hvdllm.config import compose, pace
from hvdllm.config.check import check
from hvdllm.errors import UserError
from hvdllm.world.detect import Place
from hvdllm.world.parts import World


@pytest.mark.parametrize(
    ("value", "by"),
    [(None, {}), ("1:4", {1: 4.0}), ("0:1.5, 2:1", {0: 1.5, 2: 1.0}), (["1:4", "2:2"], {1: 4.0, 2: 2.0})],
)
def test_who_is_slowed(value: Any, by: dict[int, float]) -> None:
    assert pace.slowed(value, 3) == by


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("4", "rank:factor"), (64, "in quotes"), (["1:4", 5], "rank:factor"), ("1:-4", "rank:factor"),
        ("1:nan", "rank:factor"), ("3:2", "there is no rank 3 among 3"), ("1:0.5", "at least 1"),
        ("1:2,1:3", "rank 1 twice"),
    ],
)  # fmt: skip
def test_who_cannot_be(value: Any, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        pace.slowed(value, 3)
    assert "\n" not in str(error.value)


def test_words_of_the_command_line_reach_it() -> None:
    assert pace.slowed(compose.compose(["world.slow=1:4"]).world.slow, 2) == {1: 4.0}
    assert pace.slowed(compose.compose(["world.slow=[1:4,3:2]"]).world.slow, 4) == {1: 4.0, 3: 2.0}
    assert pace.slowed(compose.compose(["world.slow='1:4,3:2'"]).world.slow, 4) == {1: 4.0, 3: 2.0}


def test_speeds_are_drawn_from_the_seed_about_the_one_given() -> None:
    world = World(size=400, tokens_per_s=100.0, speed_spread=0.3)
    speeds = pace.speeds(world, 1)
    logs = [math.log(speed / 100) for speed in speeds]
    assert abs(fmean(logs)) < 0.06 and pstdev(logs) == pytest.approx(0.3, rel=0.1)
    assert speeds == pace.speeds(world, 1) != pace.speeds(world, 2)
    assert pace.speeds(World(size=4, tokens_per_s=100.0, speed_spread=0.3), 1) == speeds[:4], "whatever the size"
    slowed = pace.speeds(World(size=4, tokens_per_s=100.0, speed_spread=0.3, slow="2:4"), 1)
    assert slowed == [*speeds[:2], speeds[2] / 4, speeds[3]]
    assert pace.speeds(World(size=2, tokens_per_s=100.0), 1) == [100.0, 100.0]


def test_bandwidth_is_bytes() -> None:
    assert pace.bandwidth(World(bandwidth="200mbit")) == 25e6 and pace.bandwidth(World()) == math.inf


CLOCK = ["world=virtual", "world.tokens_per_s=1000"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["world.slow=1:4"], "there is no rank 1 among 1"),
        (["world=virtual", "world.slow=1:4"], "give world.tokens_per_s"),
        (["world=virtual", "world.jitter=0.1"], "world.jitter is of the simulated clock"),
        (["world=virtual", "world.bandwidth=1gbit"], "world.bandwidth is of the simulated clock"),
        (["world.latency_ms=1"], "world.latency_ms is of the simulated clock"),
        (["world.tokens_per_s=1000"], "world=single has a real one"),
        ([*CLOCK, "world.bandwidth=fast"], "world.bandwidth=fast: give a rate such as 200mbit"),
        ([*CLOCK, "world.slow=9:4"], "there is no rank 9 among 4"),
    ],
)
def test_what_is_refused(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check(compose.compose(words), Place())


def test_what_is_not() -> None:
    check(compose.compose(["world.slow=1:4"]), Place("horovodrun", 0, 2, 0, 2))
    check(
        compose.compose([*CLOCK, "world.slow=3:4", "world.bandwidth=1gbit", "exchange=acco", "exchange.timed=true"]),
        Place(),
    )
