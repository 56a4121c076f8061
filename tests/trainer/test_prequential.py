"""The sums of the prequential loss against their formulas."""

from __future__ import annotations

import math

import pytest
import torch

from hvdllm.trainer.prequential import Prequential
from hvdllm.world.single import SingleWorld


def test_only_what_is_fresh_counts_and_the_recent_loss_forgets() -> None:
    """Seen to catch: windows of the past that count, and a recent loss that is that of the whole stream."""
    found, window = Prequential(SingleWorld(), 100), 100
    recent = tokens = size = whole = whole_tokens = 0.0
    for mark, loss in enumerate((80.0, 60.0, 90.0, 20.0)):
        found.saw(48, 16, torch.tensor(loss))
        found.saw(0, 16, torch.tensor(1000.0))  # of the past
        found.land()
        found.post()
        found.land()
        keep = math.exp(-16 / window)
        recent, tokens, size = recent * keep + loss, tokens * keep + 16, size * keep + 48
        whole, whole_tokens = whole + loss, whole_tokens + 16
        assert found.last.nats == pytest.approx(loss / 16) and found.last.bits == pytest.approx(loss / math.log(2) / 48)
        assert found.recent.nats == pytest.approx(recent / tokens), mark
        assert found.recent.bits == pytest.approx(recent / math.log(2) / size)
        assert found.whole.nats == pytest.approx(whole / whole_tokens)
