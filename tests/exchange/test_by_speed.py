"""How many local steps each group makes until all meet (exchange.by_speed)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hvdllm.exchange.local_rounds import Steps, steps_by_speed
from hvdllm.exchange.parts import DiLoCo, LocalSGD


def test_the_next_round_is_as_long_as_the_last_one_was_fast() -> None:
    """Steps over seconds of compute, of the slowest rank of each group; the fastest makes all."""
    pace = Steps(DiLoCo(local_steps=8, by_speed=True), SimpleNamespace(count=3, base=0))  # type: ignore[arg-type]
    pace.planned = [8, 4, 8]
    pace.next_round([0.5, 1.0, 0.9, 1.0, 4.0, 2.0])
    assert pace.planned == [8, 4, 2]
    pace.next_round([0.0] * 6)
    assert pace.planned == [8, 4, 2], "nothing is known of a round without compute"


@pytest.mark.parametrize(
    ("speeds", "steps"),
    [
        ([4.0, 1.0], [16, 4]),
        ([4.03, 1.0], [16, 4]),  # 3.97 of its steps: the fast one waits for the rest of the fourth
        ([5.3, 1.0], [16, 3]),  # 3.02
        ([4.5, 1.0], [16, 3]),  # 3.56: waiting for a fourth would cost the fast one two steps
        ([4.03, 1.0, 1.0, 1.0], [16, 4, 4, 4]),
        ([100.0, 1.0], [16, 1]),
        ([100.0, 1.0, 10.0], [16, 1, 10]),  # in the second that the slowest needs for its one
        ([2.0, 2.0], [16, 16]),
    ],
)
def test_rounds_by_speed_make_the_most_steps_a_second(speeds: list[float], steps: list[int]) -> None:
    assert steps_by_speed(speeds, 16) == steps


def test_the_pace_goes_by_the_steps_that_were_made() -> None:
    """In the warm-up of one step a round, and where a slow group makes one a pulse. Seen to catch: by those planned."""
    group: Any = SimpleNamespace(count=2, base=0)
    pace = Steps(LocalSGD(local_steps=16, pulses=4, by_speed=True), group, warmup_tokens=100)
    for _ in range(3):
        pace.next_round([1.0, 4.0])
        assert pace.planned == [16, 4]
    group.base = 100
    pace.next_round([16.0, 4 * 16.0])
    assert pace.planned == [16, 1]
    pace.next_round([16.0, 16.0])
    assert pace.planned == [16, 4], "four steps were made, one a pulse"
