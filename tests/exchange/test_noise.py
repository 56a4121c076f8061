"""The gradient noise scale against gradients whose noise is known."""

import numpy as np
import pytest

from hvdllm.exchange import noise


def test_both_parts_are_unbiased_for_unequal_counts() -> None:
    draw = np.random.default_rng(0)
    mean, spread = draw.normal(size=100) * 0.2, draw.random(100)
    counts = np.array([3, 8, 20, 1, 40, 9, 9, 30])
    found = []
    for _ in range(4000):
        means = mean + draw.normal(size=(8, 100)) * spread / np.sqrt(counts)[:, None]
        whole = (counts[:, None] * means).sum(0) / counts.sum()
        squares = (counts * (means**2).sum(1)).sum()
        found.append(noise.estimate(squares, float(np.linalg.norm(whole)), counts.sum(), 8))
    truth = mean @ mean, spread @ spread
    assert np.mean(found, 0) / truth == pytest.approx([1, 1], abs=0.02)


def test_one_rank_has_no_spread_and_nothing_is_made_up() -> None:
    assert noise.estimate(1.0, 1.0, 5.0, 1) is None
    assert noise.scale(None) is None and noise.scale((-0.1, 3.0)) is None and noise.scale((0.5, 3.0)) == 6.0


def test_parts_are_smoothed_apart() -> None:
    means = None
    for new in ((1.0, 8.0), (3.0, 2.0)):
        means = noise.smooth(means, new, keep=0.5)
    assert means == (2.0, 5.0)
