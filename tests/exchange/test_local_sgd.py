"""exchange=local_sgd: the mean of the weights, and rounds as long as a group is fast."""

from __future__ import annotations

import pytest
import torch
from local_kit import OPTIMS, by_hand, rate
from rig import train

from hvdllm.exchange.parts import LocalSGD


@pytest.mark.parametrize("warmup", [0, 30])
def test_local_sgd_takes_the_mean_of_the_weights(warmup: int) -> None:
    """Synchronous at first (post-local); evaluation sees the mean of the weights, in mid-round too."""
    size, exchange = 3, LocalSGD(local_steps=3, warmup_tokens=warmup, pulses=3)
    ones = 0 if warmup == 0 else 2  # rounds of one step, of about 15 examples
    anchors, tokens = by_hand(OPTIMS[1], size, [1] * ones + [3, 3], 1.0, 0.0)
    rigs = train(exchange, size, ones + 4, optim=OPTIMS[1], rate=rate, acts=True)
    torch.testing.assert_close(rigs[0].weights[-1], anchors[-1], rtol=0, atol=1e-11)
    assert rigs[0].commits[-1].tokens == tokens[-1]
    middle = ones  # the first mark of the first long round: after two of its three steps
    mean = torch.stack([rig.weights[middle] for rig in rigs]).mean(0)
    assert not torch.equal(rigs[0].weights[middle], rigs[1].weights[middle])
    for rig in rigs:
        torch.testing.assert_close(rig.kept[middle], mean, rtol=0, atol=1e-12)
