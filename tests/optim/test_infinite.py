"""schedule=infinite: a rate without an end, which rises again where the stream has changed."""

from __future__ import annotations

import math
from typing import Any

import pytest

from hvdllm.config import compose
from hvdllm.config.check import check
from hvdllm.errors import UserError
from hvdllm.optim.parts import Constant, Infinite
from hvdllm.optim.schedule import Factor, factor
from hvdllm.world.detect import Place


def made(**settings: Any) -> Factor:
    return factor(Infinite(warmup_tokens=100, settle_tokens=200, hold=0.2, **settings), 1000, 10)


def test_values_at_the_borders() -> None:
    rate = made()
    assert [rate(t) for t in (0, 50, 100, 200, 300, 301, 10**12)] == pytest.approx([0, 0.5, 1, 0.6, 0.2, 0.2, 0.2])
    assert rate(150) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)


@pytest.mark.parametrize("at", [30, 100, 170, 300, 5000])
@pytest.mark.parametrize("hand", [True, False])
def test_the_rate_is_continuous_where_it_is_rewarmed(at: int, hand: bool) -> None:
    """Seen to catch: a rise that begins at `hold` although the rate was elsewhere."""
    before, rate = made(), made(rewarm_at=[at] if hand else None)
    assert hand or rate.rewarm(at)
    assert [rate(t) for t in range(at + 1)] == [before(t) for t in range(at + 1)]
    assert rate(at + 50) == pytest.approx((before(at) + 1) / 2)
    assert rate(at + 100) == 1 and rate(at + 300) == pytest.approx(0.2)
    assert max(abs(rate(t + 1) - rate(t)) for t in range(at, at + 400)) < 0.0101


def test_several_places_in_any_order_make_one_curve() -> None:
    rate, other = made(rewarm_at=[900, 400]), made(rewarm_at=[900])
    other.rewarm(400)
    other.rewarm(900)  # the same place twice
    curve = [rate(t) for t in range(1500)]
    assert curve == [other(t) for t in range(1500)]
    assert [t for t in range(1500) if curve[t] == 1] == [100, 500, 1000]


def test_only_drift_rewarms_and_only_where_it_is_asked_for() -> None:
    rate = made(rewarm="never", rewarm_at=[500])
    assert not rate.rewarm(700) and rate.rewarmed == [] and rate(600) == 1 and rate(800) == pytest.approx(0.2)
    assert not factor(Constant(), 1000).rewarm(7)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("schedule.warmup=0.1", "warmup_tokens"),
        ("schedule.horizon=1000", "has no end"),
        ("schedule.rewarm_at=[0]", "no list of tokens"),
        ("schedule.rewarm_at=7", "no list of tokens"),
        ("schedule.rewarm_at=[true]", "no list of tokens"),
        ("schedule.rewarm_at=[soon]", "no list of tokens"),
        ("schedule.hold=1.5", "hold"),
        ("schedule.rewarm=often", "rewarm"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(compose.compose(["schedule=infinite", word]), Place("none", 0, 1))


def test_without_a_stream_the_rate_is_held() -> None:
    config = compose.compose(["schedule=infinite", "schedule.rewarm_at=[1M, 3_000_000]"])
    assert compose.from_dict(compose.to_dict(config)).schedule == config.schedule
    check(config, Place("none", 0, 1))
    rate = factor(config.schedule, config.budget_tokens, config.batch_tokens)
    assert rate(900_000) == pytest.approx(0.3) and rate(1_050_000) == 1
