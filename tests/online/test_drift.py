"""The test for drift: how often it is wrong, how soon it is right, and what learning looks like to it."""

from __future__ import annotations

import numpy as np
import pytest

from hvdllm.online.drift import LEAST, Drift


def alarms(losses: np.ndarray) -> list[int]:
    drift = Drift()
    return [number for number, loss in enumerate(losses) if drift.note(float(loss))]


def test_false_alarms_on_one_law_are_as_rare_as_the_page_says() -> None:
    """Poisson's law gives 8 to 34 in 99.8 % of cases, if 20 in 200,000 records are expected."""
    assert 8 <= len(alarms(4 + 0.05 * np.random.default_rng(1).standard_normal(200_000))) <= 34


def test_short_runs_are_no_worse() -> None:
    draw = np.random.default_rng(0)
    found = sum(len(alarms(4 + 0.05 * draw.standard_normal(1000))) for _ in range(200))
    assert found <= 40, "that is once in 5,000 records"


@pytest.mark.parametrize("law", ["exponential", "power"])
def test_a_loss_that_falls_because_the_model_learns_is_no_drift(law: str) -> None:
    draw = np.random.default_rng(1)
    steps = np.arange(400)
    curve = 3 + 4 * np.exp(-steps / 60) if law == "exponential" else 2.5 + 5 * (steps + 5.0) ** -0.3
    found = [len(alarms(curve + 0.05 * draw.standard_normal(400))) for _ in range(50)]
    assert sum(found) <= 5  # 20,000 records


@pytest.mark.parametrize("falling", [0.0, 0.02])
@pytest.mark.parametrize("jump", [0.4, 1.0])  # of a loss of 4 whose records differ by 0.08
def test_a_jump_is_found_within_three_records_also_while_the_loss_falls(jump: float, falling: float) -> None:
    draw = np.random.default_rng(2)
    late, early = [], 0
    for _ in range(50):
        losses = 4 + falling * np.arange(60, -40, -1) + 0.08 * draw.standard_normal(100)
        losses[60:] += jump
        found = alarms(losses)
        early += sum(number < 60 for number in found)
        late.append(next((number - 60 for number in found if number >= 60), 100))
    assert sum(records < 3 for records in late) >= 47 and early == 0


def test_one_odd_record_is_no_drift() -> None:
    losses = 4 + 0.05 * np.random.default_rng(5).standard_normal(200)
    losses[150] = 100.0
    assert alarms(losses) == []


def test_it_begins_anew_after_a_drift() -> None:
    losses = 4 + 0.05 * np.random.default_rng(4).standard_normal(200)
    losses[100:] += 1
    losses[102 + LEAST + 10 :] += 1
    first, second = alarms(losses)
    assert first <= 102 and 112 + LEAST <= second <= 115 + LEAST


def test_its_state_is_all_that_it_knows() -> None:
    losses = 4 + 0.05 * np.random.default_rng(3).standard_normal(200)
    losses[120:] += 1
    one = Drift()
    for loss in losses[:100]:
        one.note(loss)
    two = Drift.of(one.state())
    told = [one.note(loss) for loss in losses[100:]]
    assert told == [two.note(loss) for loss in losses[100:]] and sum(told) == 1
    with pytest.raises(ValueError, match="form of this version"):
        Drift.of({"seen": "many"})
