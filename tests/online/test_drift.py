"""The test for drift: how often it is wrong, how soon it is right, and what learning looks like to it."""

from __future__ import annotations

import numpy as np
import pytest

from hvdllm.online.drift import Drift


def alarms(losses: np.ndarray) -> list[int]:
    drift = Drift()
    return [number for number, loss in enumerate(losses) if drift.note(float(loss))]


def test_false_alarms_on_one_law_are_as_rare_as_the_page_says() -> None:
    draw = np.random.default_rng(0)
    found = sum(len(alarms(4 + 0.05 * draw.standard_normal(1000))) for _ in range(100))
    assert 20 <= found <= 160  # 100,000 records, once in about 1,300


def test_a_loss_that_falls_because_the_model_learns_is_no_drift() -> None:
    draw = np.random.default_rng(1)
    steps = np.arange(400)
    found = [len(alarms(3 + 4 * np.exp(-steps / 60) + 0.05 * draw.standard_normal(400))) for _ in range(50)]
    assert sum(found) <= 10


@pytest.mark.parametrize("jump", [0.2, 1.0])
def test_a_jump_is_found_within_a_few_records(jump: float) -> None:
    draw = np.random.default_rng(2)
    late = []
    for _ in range(50):
        losses = 4 + 0.05 * draw.standard_normal(300)
        losses[200:] += jump
        late += [number - 200 for number in alarms(losses) if number >= 200][:1]
    assert len(late) == 50 and max(late) <= (8 if jump < 1 else 2)


def test_its_state_is_all_that_it_knows() -> None:
    losses = 4 + 0.05 * np.random.default_rng(3).standard_normal(200)
    losses[120:] += 1
    one = Drift()
    for loss in losses[:100]:
        one.note(loss)
    two = Drift.of(one.state())
    assert [one.note(loss) for loss in losses[100:]] == [two.note(loss) for loss in losses[100:]]
    with pytest.raises(ValueError, match="form of this version"):
        Drift.of({"seen": "many"})
